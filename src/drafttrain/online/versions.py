"""The published versions of one drafter: `current` is a link that is switched by a rename, so it always names a whole folder.

0000/ 0001/ ...   versions, each with published.json: which update made it, what it replaced, by how much it was better
current           -> the version that is served. Who loads it resolves the link once: versions are never changed
history.jsonl     everything that happened, one line each
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside, write_json

PUBLISHED = "published.json"


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

    def publish(self, version: str, **figures: Any) -> None:
        """Serve a version from now on, note it, and tell the serving stack."""
        self._switch(version)
        self.note("published", version=version, update=self.about(version)["update"], **figures)
        self._prune()
        self.call_hook()

    def drop(self, version: str) -> None:
        """Remove a version that was not published."""
        shutil.rmtree(self.path(version), ignore_errors=True)

    def rollback(self) -> tuple[str, str]:
        """Serve the version that the current one replaced; return both.

        Raises:
            CheckpointError: The current one replaced none, or that is no longer kept.
        """
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

    def _switch(self, version: str) -> None:
        link = self.folder / f".current.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(version)
        os.replace(link, self.folder / "current")
        _sync_folder(self.folder)

    def _prune(self) -> None:
        current = self.current()
        kept = {current, self.about(current)["replaces"]}
        for name in self.names()[: -self._keep]:
            if name not in kept:
                shutil.rmtree(self.path(name), ignore_errors=True)

    def call_hook(self) -> None:
        """Run the command of the serving stack; that it fails is noted, and changes nothing."""
        if not self._hook:
            return
        path = str(self.path(self.current()).resolve())
        words = [word.replace("{path}", path).replace("{version}", self.current()) for word in self._hook]
        try:
            done = subprocess.run(words, timeout=self._timeout, check=False, capture_output=True, text=True)
            problem = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-200:]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            say(f"online.on_publish: {words[0]}: {problem}")
            self.note("hook_failed", version=self.current(), problem=problem)

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
        """Take away what a killed publish left: links that were not renamed, folders that were not, a switch that was not noted."""
        for path in [*self.folder.glob(".current.*"), *self.folder.glob(".[0-9]*")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not self.has_current():
            return
        served = [one["version"] for one in self.history() if one["event"] in ("published", "rolled_back")]
        if not served or served[-1] != self.current():
            self.note("published", version=self.current(), update=self.about(self.current())["update"], noted_late=True)


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
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
