"""The published versions of one drafter. `current` is a link that is replaced by a rename, so it always names a complete folder.

0000/ 0001/ ...   versions, each with published.json: the update that made it and the version it replaced
current           -> the served version. A server resolves the link once: versions never change
history.jsonl     one line per event
lock              held while `current` is switched or versions are removed, because rollbacks come from another process
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
"""Length of the error output of a failed hook in the history."""
HOOK_EVENTS = ("hook_ran", "hook_failed", "told")
"""Events after which the hook does not have to run again for the same version; older versions wrote "told" for hook_ran."""


class Versions:
    """The versions in a folder.

    Args:
        hook: Command that runs after `current` is switched, as a list of words. {path} and {version} are replaced.
    """

    def __init__(
        self, folder: Path, *, keep: int = 10, hook: Sequence[str] = (), hook_timeout_seconds: float = 60.0
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._hook = list(hook)
        self._timeout = hook_timeout_seconds

    def names(self) -> list[str]:
        """Return the versions, oldest first."""
        return sorted(path.name for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def current(self) -> str:
        """Return the served version.

        Raises:
            CheckpointError: No version is published.
        """
        try:
            return os.readlink(self.folder / "current")
        except OSError as error:
            raise CheckpointError(f"no published version in {self.folder}") from error

    def has_current(self) -> bool:
        """Return whether a version is published."""
        return (self.folder / "current").is_symlink()

    def path(self, version: str) -> Path:
        """Return the folder of a version."""
        return self.folder / version

    def about(self, version: str) -> dict[str, Any]:
        """Return the content of published.json of a version."""
        found: dict[str, Any] = json.loads((self.path(version) / PUBLISHED).read_text(encoding="utf-8"))
        return found

    def of_update(self, update: int) -> str | None:
        """Return the version that an update exported, so that an update repeated after a kill does not publish again."""
        return next((name for name in self.names() if self.about(name)["update"] == update), None)

    def add(self, write: Callable[[Path], None], *, update: int) -> str:
        """Write a version without serving it, completely or not at all. Return its name."""
        number = max((int(name) for name in self.names()), default=-1) + 1
        version = f"{number:04d}"
        replaces = self.current() if self.has_current() else None
        with folder_beside(self.path(version)) as temporary:
            write(temporary)
            write_json(temporary / PUBLISHED, {"update": update, "replaces": replaces, "at": time.time()})
            _sync(temporary)
        return version

    def publish(self, version: str, *, instead_of: str | None = None, **figures: Any) -> bool:
        """Serve a version from now on, log it and run the hook. Return whether it is served.

        Args:
            instead_of: Publish only if this version is still the served one.
        """
        with self._locked():
            if instead_of is not None and self.current() != instead_of:
                return False
            self._switch(version)
            self.log_event("published", version=version, update=self.about(version)["update"], **figures)
        self.call_hook()
        return True

    def remove(self, version: str) -> None:
        """Remove a version that is not served."""
        # Renamed first, so that a kill cannot leave an incomplete version.
        gone = self.folder / f".{version}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.path(version), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def rollback(self) -> tuple[str, str]:
        """Serve the version that the current one replaced. Return both.

        Raises:
            CheckpointError: The current version replaced none, or the replaced one was removed.
        """
        with self._locked():
            before = self.current()
            replaced = self.about(before)["replaces"]
            if replaced is None:
                raise CheckpointError(f"{self.folder}: {before} is the first version, so it cannot be rolled back")
            if not self.path(replaced).is_dir():
                raise CheckpointError(f"{self.folder}: {replaced} was removed (online.keep_versions)")
            self._switch(replaced)
            self.log_event("rolled_back", version=replaced, instead_of=before)
        self.call_hook()
        return before, replaced

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder for a moment. Not while the hook runs, because the hook may switch versions too."""
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
        """Remove old versions, except the served one, the one it replaced, and the held one.

        Args:
            held: The version from which a learner would resume after a kill.
        """
        with self._locked():
            current = self.current()
            kept = {current, self.about(current)["replaces"], held}
            for name in self.names()[: -self._keep]:
                if name not in kept:
                    self.remove(name)

    def call_hook(self) -> None:
        """Run the hook for the served version. A failure is logged and changes nothing else."""
        notified = ""
        # Another process may switch meanwhile, and its hook may end before this one.
        while self._hook and notified != self.current():
            notified = self.current()
            problem = self._hook_problem(notified)
            if problem:
                say(f"online.on_publish: {self._hook[0]}: {problem}")
            event = "hook_failed" if problem else "hook_ran"
            self.log_event(event, version=notified, **({"problem": problem} if problem else {}))

    def _hook_problem(self, version: str) -> str:
        path = str(self.path(version).resolve())
        words = [word.replace("{path}", path).replace("{version}", version) for word in self._hook]
        # Not a pipe: a server that the command leaves running would keep it open.
        with tempfile.TemporaryFile() as output:
            try:
                done = subprocess.run(
                    words, timeout=self._timeout, check=False, stdout=subprocess.DEVNULL, stderr=output
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            output.seek(max(0, output.seek(0, os.SEEK_END) - SHOWN_BYTES))
            shown = output.read(SHOWN_BYTES).decode("utf-8", "replace").strip()
        return "" if done.returncode == 0 else f"exit code {done.returncode}: {shown}"

    def log_event(self, event: str, **values: Any) -> None:
        """Append a line to the history. It is on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "at": time.time()} | values) + "\n"
        path = self.folder / "history.jsonl"
        # A kill may have left an incomplete line: start a new one.
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
                continue  # an incomplete line
        return events

    def repair(self) -> None:
        """Finish what a kill interrupted: remove leftovers, log a switch that was not logged, and run a hook that did not run."""
        with self._locked():
            for path in [*self.folder.glob(".current.*"), *self.folder.glob(".[0-9]*")]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not self.has_current():
                return
            served = [one["version"] for one in self.history() if one["event"] in SWITCHES]
            if not served or served[-1] != self.current():
                self.log_event(
                    "published", version=self.current(), update=self.about(self.current())["update"], noted_late=True
                )
            self._remove_candidates()
        notified = [one["version"] for one in self.history() if one["event"] in HOOK_EVENTS]
        if not notified or notified[-1] != self.current():
            self.call_hook()

    def _remove_candidates(self) -> None:
        """Remove versions that were never served: their judgement was interrupted."""
        served = {one.get(key) for one in self.history() for key in ("version", "instead_of")}
        for name in self.names():
            if name not in served:
                self.remove(name)


def publish_first(versions: Versions, start: Path) -> None:
    """Publish the first drafter of a run, unless a version is published already."""
    if not versions.has_current():
        for name in versions.names():
            versions.remove(name)
        versions.publish(versions.add(lambda folder: _copy(start, folder), update=0))


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
