"""One environment of other people's software: installed once from its pins into the user's cache, and asked through a worker file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import user_cache, write_json
from drafttrain.distributed.world import for_own_program

ROOT_VARIABLE = "DRAFTTRAIN_ENGINES"
INSTALLED = "installed.json"
"""Written last: an environment without it is incomplete."""

LAST_LINES = 25
RUNNER = Path(__file__).with_name("in_engine.py")
TIMEOUT_SECONDS = 3600.0


class EngineError(DrafttrainError):
    """An engine is not installed, could not be installed, or did not answer."""


@dataclass(frozen=True)
class Environment:
    """A Python environment that holds one engine or library, apart from drafttrain's own."""

    name: str
    """What `drafttrain engines install` calls it."""
    pins: tuple[str, ...] = ()
    """What pip installs; empty: the software runs in drafttrain's own Python."""
    removed: tuple[str, ...] = ()
    """Packages that pip installs as dependencies and that break the import: they are uninstalled again."""
    size: str = "some gigabytes, some minutes"
    """Disk space and time of the installation."""
    serves: bool = True
    """Whether a serving engine runs in it that `export.verify` can name; else it only writes texts or loads exports."""


def root() -> Path:
    """Return the folder of all environments."""
    if given := os.environ.get(ROOT_VARIABLE):
        return Path(given).expanduser()
    return user_cache() / "engines"


def folder_of(environment: Environment) -> Path:
    """Return the folder of an environment, whether it is installed or not; other pins give another folder."""
    key = json.dumps([environment.pins, environment.removed, sys.version_info[:2]])
    return root() / f"{environment.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def python_of(environment: Environment) -> Path:
    """Return the Python that runs the workers of an environment; without pins, this one."""
    return folder_of(environment) / "bin" / "python" if environment.pins else Path(sys.executable)


def is_installed(environment: Environment) -> bool:
    """Return whether an environment is completely installed."""
    return not environment.pins or (folder_of(environment) / INSTALLED).is_file()


def check_installed(environment: Environment) -> None:
    """Check that an environment is installed.

    Raises:
        EngineError: It is not installed; the message names the command that installs it.
    """
    if not is_installed(environment):
        raise EngineError(
            f"{environment.name} is not installed in {folder_of(environment)}. "
            f"Run: drafttrain engines install {environment.name}"
        )


def install(environment: Environment) -> Path:
    """Install an environment unless it is there already; return its folder.

    Raises:
        EngineError: pip failed: there is no package registry, or it lacks a pin.
    """
    folder = folder_of(environment)
    if not environment.pins:
        return Path(sys.prefix)
    if is_installed(environment):
        say(f"{environment.name}: already installed in {folder}")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"{environment.name}: installing {', '.join(environment.pins)} into {folder} ({environment.size})")
    # -I: packages on PYTHONPATH must not count as installed here.
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip"]
    _run([sys.executable, "-m", "venv", str(folder)], environment)
    _run([*pip, "install", "--quiet", "--disable-pip-version-check", *environment.pins], environment)
    if environment.removed:
        _run([*pip, "uninstall", "--quiet", "--yes", *environment.removed], environment)
    write_json(folder / INSTALLED, {"pins": environment.pins, "removed": environment.removed})
    return folder


def ask(
    environment: Environment,
    worker: Path,
    request: Mapping[str, Any],
    *,
    timeout_seconds: float | None = TIMEOUT_SECONDS,
) -> dict[str, Any]:
    """Run a worker in an environment on a request and return its answer.

    Args:
        worker: A Python file with a function `answer_to(request)`; it cannot import drafttrain.
        timeout_seconds: None: no limit.

    Raises:
        EngineError: The environment is not installed, or the worker failed; the message ends with its last log lines.
    """
    check_installed(environment)
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        asked, answered, log = (Path(temporary) / name for name in ("request.json", "answer.json", "log.txt"))
        write_json(asked, dict(request))
        # -I: the worker sees the packages of its own environment only.
        command = [*map(str, (python_of(environment), "-I", RUNNER, worker, asked, answered))]
        with log.open("w", encoding="utf-8") as written:
            try:
                code = subprocess.run(
                    command,
                    stdout=written,
                    stderr=written,
                    check=False,
                    timeout=timeout_seconds,
                    cwd=temporary,
                    # An engine that sees the variables of torchrun would wait for the other ranks.
                    env=for_own_program(os.environ),
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise EngineError(f"{environment.name} did not answer within {timeout_seconds:g} seconds") from error
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        if not answered.exists():
            raise EngineError(f"{environment.name} stopped with exit code {code} and no answer:\n{last}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in answer:
        raise EngineError(f"{environment.name} failed: {answer['error']}\n{last}")
    return answer


def _run(command: list[str], environment: Environment) -> None:
    """Run one step of an installation."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
        raise EngineError(
            f"{environment.name} could not be installed: `{' '.join(command[1:])}` ended with exit code {done.returncode}. "
            f"It needs a package registry with {', '.join(environment.pins)} and their dependencies (a torch with local "
            f"version +cpu is in PyTorch's own CPU index: set PIP_EXTRA_INDEX_URL).\n{last}"
        )
