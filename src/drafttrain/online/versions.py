"""The published versions of one drafter: `current` is a link that is switched by a rename, so it always names a whole folder.

0000/ 0001/ ...   versions, each with published.json: which update made it, what it replaced, by how much it was better
current           -> the version that is served. Who loads it resolves the link once: versions are never changed
history.jsonl     everything that happened, one line each
lock              held while `current` is switched or versions are removed: a learner and who takes a version back are two processes
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside, lock, sync_folder, write_json

PUBLISHED = "published.json"
SWITCHES = ("published", "rolled_back")
"""Events after which `current` names another version."""
SHOWN_BYTES = 200
"""Of what a hook that failed said last."""
TELLINGS = ("told", "hook_failed")
"""Events after which the serving stack knows what is served, or could not be told."""


class Versions:
    """What was published in a folder.

    Args:
        hook: Words of a command that is run after `current` was switched; {path} and {version} are replaced.
    """

    def __init__(
        self, folder: Path, *, keep: int = 10, hook: Sequence[str] = (), hook_timeout_seconds: float = 60.0
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._hook = list(hook)
        self._timeout = hook_timeout_seconds

    def names(self) -> list[str]:
        """Return the versions that are here, oldest first."""
        return sorted(path.name for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def current(self) -> str:
        """Return the version that is served.

        Raises:
            CheckpointError: Nothing was published.
        """
        try:
            return os.readlink(self.folder / "current")
        except OSError as error:
            raise CheckpointError(f"{self.folder}: nothing is published here yet") from error

    def has_current(self) -> bool:
        """Tell whether anything was published."""
        return (self.folder / "current").is_symlink()

    def path(self, version: str) -> Path:
        """Return the folder of a version."""
        return self.folder / version

    def about(self, version: str) -> dict[str, Any]:
        """Return what is known of how a version came about."""
        found: dict[str, Any] = json.loads((self.path(version) / PUBLISHED).read_text(encoding="utf-8"))
        return found

    def made_by(self, update: int) -> str | None:
        """Return the version that an update led to: one that was killed after it published does not publish again."""
        return next((name for name in self.names() if self.about(name)["update"] == update), None)

    def add(self, write: Callable[[Path], None], *, update: int) -> str:
        """Write a version that nobody is served yet, whole or not at all, and return its name."""
        number = max((int(name) for name in self.names()), default=-1) + 1
        version = f"{number:04d}"
        replaces = self.current() if self.has_current() else None
        with folder_beside(self.path(version)) as temporary:
            write(temporary)
            write_json(temporary / PUBLISHED, {"update": update, "replaces": replaces, "at": time.time()})
            _to_disk(temporary)
        return version

    def publish(self, version: str, *, instead_of: str | None = None, **figures: Any) -> bool:
        """Serve a version from now on, note it, and tell the serving stack; tell whether it is served.

        Args:
            instead_of: Where another version than this one is served by now, that one stays.
        """
        with self._alone():
            if instead_of is not None and self.current() != instead_of:
                return False
            self._switch(version)
            self.note("published", version=version, update=self.about(version)["update"], **figures)
        self.call_hook()
        return True

    def drop(self, version: str) -> None:
        """Remove a version that was not published."""
        # Renamed first: what a kill leaves of it is no version.
        gone = self.folder / f".{version}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.path(version), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def rollback(self) -> tuple[str, str]:
        """Serve the version that the current one replaced; return both.

        Raises:
            CheckpointError: The current one replaced none, or that is no longer kept.
        """
        with self._alone():
            before = self.current()
            replaced = self.about(before)["replaces"]
            if replaced is None:
                raise CheckpointError(f"{self.folder}: {before} is the first version: there is none to go back to")
            if not self.path(replaced).is_dir():
                raise CheckpointError(f"{self.folder}: {replaced} is no longer kept (online.keep_versions)")
            self._switch(replaced)
            self.note("rolled_back", version=replaced, instead_of=before)
        self.call_hook()
        return before, replaced

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder against others that switch or remove, for moments only: never while the hook runs, which may do so too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            lock(file.fileno(), wait=True)
            yield

    def _switch(self, version: str) -> None:
        link = self.folder / f".current.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(version)
        os.replace(link, self.folder / "current")
        sync_folder(self.folder)

    def prune(self, *, held: str) -> None:
        """Remove versions beyond the newest ones that are kept, but not what is served, what that replaced, nor what is held.

        Args:
            held: The version that a learner would start from after a kill.
        """
        with self._alone():
            current = self.current()
            kept = {current, self.about(current)["replaces"], held}
            for name in self.names()[: -self._keep]:
                if name not in kept:
                    self.drop(name)

    def call_hook(self) -> None:
        """Tell the serving stack what is served; that it cannot be told is noted, and changes nothing."""
        told = ""
        # Another process may switch meanwhile, and its own hook may have ended before this one.
        while self._hook and told != self.current():
            told = self.current()
            problem = self._problem_of_hook(told)
            if problem:
                say(f"online.on_publish: {self._hook[0]}: {problem}")
            self.note("hook_failed" if problem else "told", version=told, **({"problem": problem} if problem else {}))

    def _problem_of_hook(self, version: str) -> str:
        path = str(self.path(version).resolve())
        words = [word.replace("{path}", path).replace("{version}", version) for word in self._hook]
        # No pipe: a server that the command leaves running would hold it open.
        with tempfile.TemporaryFile() as said:
            try:
                done = subprocess.run(words, timeout=self._timeout, check=False, stdout=subprocess.DEVNULL, stderr=said)
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            said.seek(max(0, said.seek(0, os.SEEK_END) - SHOWN_BYTES))
            shown = said.read(SHOWN_BYTES).decode("utf-8", "replace").strip()
        return "" if done.returncode == 0 else f"exit code {done.returncode}: {shown}"

    def note(self, event: str, **values: Any) -> None:
        """Append a line to the history; it is on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "at": time.time()} | values) + "\n"
        path = self.folder / "history.jsonl"
        # A kill may have left half a line: what follows begins a new one.
        cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + line)
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Return all events, oldest first."""
        path = self.folder / "history.jsonl"
        events: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # half a line
        return events

    def mend(self) -> None:
        """Take away what a killed publish left, note a switch that was not noted, tell the serving stack what it was not told."""
        with self._alone():
            for path in [*self.folder.glob(".current.*"), *self.folder.glob(".[0-9]*")]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not self.has_current():
                return
            served = [one["version"] for one in self.history() if one["event"] in SWITCHES]
            if not served or served[-1] != self.current():
                self.note(
                    "published", version=self.current(), update=self.about(self.current())["update"], noted_late=True
                )
            self._drop_candidates()
        told = [one["version"] for one in self.history() if one["event"] in TELLINGS]
        if not told or told[-1] != self.current():
            self.call_hook()

    def _drop_candidates(self) -> None:
        """Remove versions that were never served: the judgement on them did not come to its end."""
        served = {one.get(key) for one in self.history() for key in ("version", "instead_of")}
        for name in self.names():
            if name not in served:
                self.drop(name)


def publish_first(versions: Versions, start: Path) -> None:
    """Publish the drafter that a run starts with."""
    if not versions.has_current():
        for name in versions.names():
            versions.drop(name)
        versions.publish(versions.add(lambda folder: _copy(start, folder), update=0))


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
