"""The environment of an engine: made once by its pins, in the user's cache, and asked by a worker that knows nothing of drafttrain."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import write_json
from drafttrain.distributed.world import for_own_program
from drafttrain.serving.engines import Installed

ROOT_VARIABLE = "DRAFTTRAIN_ENGINES"
INSTALLED = "installed.json"
"""Written last: an environment without it was left half made."""

LAST_LINES = 25
RUNNER = Path(__file__).with_name("in_engine.py")
TIMEOUT_SECONDS = 3600.0


class EngineError(DrafttrainError):
    """An engine that is not installed, could not be, or did not answer."""


def root() -> Path:
    """Return the folder of all environments."""
    if given := os.environ.get(ROOT_VARIABLE):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "drafttrain" / "engines"


def folder_of(engine: Installed) -> Path:
    """Return where the environment of these pins is or would be."""
    key = json.dumps([engine.pins, engine.removed, sys.version_info[:2]])
    return root() / f"{engine.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def python_of(engine: Installed) -> Path:
    """Return the Python that an engine's worker runs in: of its environment, or this one where it needs no other."""
    return folder_of(engine) / "bin" / "python" if engine.pins else Path(sys.executable)


def is_installed(engine: Installed) -> bool:
    """Tell whether the environment of these pins is whole."""
    return not engine.pins or (folder_of(engine) / INSTALLED).is_file()


def check_installed(engine: Installed) -> None:
    """Refuse to go on without the environment of an engine.

    Raises:
        EngineError: It is not there.
    """
    if not is_installed(engine):
        raise EngineError(
            f"{engine.name} is not installed here ({folder_of(engine)}): drafttrain engines install {engine.name}"
        )


def install(engine: Installed) -> Path:
    """Make the environment of an engine, or find it made.

    Raises:
        EngineError: pip could not: there is no registry, or it lacks a pin.
    """
    folder = folder_of(engine)
    if not engine.pins:
        return Path(sys.prefix)
    if is_installed(engine):
        say(f"{engine.name}: installed already in {folder}")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"{engine.name}: installing {', '.join(engine.pins)} into {folder} ({engine.size})")
    # Isolated: what PYTHONPATH has must not pass for what is installed.
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip"]
    _made([sys.executable, "-m", "venv", str(folder)], engine)
    _made([*pip, "install", "--quiet", "--disable-pip-version-check", *engine.pins], engine)
    if engine.removed:
        _made([*pip, "uninstall", "--quiet", "--yes", *engine.removed], engine)
    write_json(folder / INSTALLED, {"pins": engine.pins, "removed": engine.removed})
    return folder


def ask(
    engine: Installed,
    request: Mapping[str, Any],
    *,
    worker: Path | None = None,
    timeout_seconds: float | None = TIMEOUT_SECONDS,
) -> dict[str, Any]:
    """Run a worker of the engine on a request and return its answer.

    Args:
        worker: Its file; None: the one that proves exports.
        timeout_seconds: None: for as long as it takes.

    Raises:
        EngineError: The engine is not installed here, or it failed; with the last lines that it wrote.
    """
    check_installed(engine)
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        asked, answered, log = (Path(temporary) / name for name in ("request.json", "answer.json", "log.txt"))
        write_json(asked, dict(request))
        with log.open("w", encoding="utf-8") as written:
            # Isolated: nothing of this process's environment of packages is seen by the engine's.
            command = [
                str(python_of(engine)),
                "-I",
                str(RUNNER),
                str(worker or engine.worker),
                str(asked),
                str(answered),
            ]
            # Nor is a launcher's: an engine that takes itself for one of several processes waits for the others.
            environment = for_own_program(os.environ)
            try:
                code = subprocess.run(
                    command,
                    stdout=written,
                    stderr=written,
                    check=False,
                    timeout=timeout_seconds,
                    cwd=temporary,
                    env=environment,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise EngineError(f"{engine.name} did not answer within {error.timeout:g} seconds") from error
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        if not answered.exists():
            raise EngineError(f"{engine.name} ended with exit code {code} and no answer:\n{last}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in answer:
        raise EngineError(f"{engine.name} could not run this: {answer['error']}\n{last}")
    return answer


def _made(command: list[str], engine: Installed) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
        raise EngineError(
            f"{engine.name} could not be installed: `{' '.join(command[1:])}` ended with {done.returncode}. It needs a "
            f"package registry that has {', '.join(engine.pins)} and what they need (a torch of local version +cpu is in "
            f"PyTorch's own CPU index: PIP_EXTRA_INDEX_URL).\n{last}"
        )
