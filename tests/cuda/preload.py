"""The guard: built by the machine's C++ compiler, kept for the next run, and loaded before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
KEPT = Path(__file__).parents[2] / ".pytest_cache" / "pretended_cuda"
"""Beside what pytest keeps: not under version control, and dropped with it."""
COMPILERS = ("c++", "g++", "clang++")

loaded_guard: ctypes.CDLL | None = None
"""The guard, once it is loaded."""


class NotPossible(Exception):
    """Why CUDA cannot be pretended here, in one sentence."""


def load() -> None:
    """Load the guard, so that the torch that is imported next finds a CUDA.

    Raises:
        NotPossible: There is no compiler, torch has its own CUDA, or was imported already.
    """
    global loaded_guard
    if loaded_guard is not None:
        return
    if "torch" in sys.modules:
        raise NotPossible("torch was imported before the guard: start with `python -m pytest -p tests.cuda.plugin`")
    torch = Path(str(find_spec("torch").origin)).parent  # type: ignore[union-attr]
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotPossible("this torch has a CUDA of its own: the suite is for the CPU build, `make gpu-check` for GPUs")
    guard = built(torch)
    # The guard finds them by name when it is loaded: they may not be on any path of the system's.
    needed = [path for path in (torch / "lib").iterdir() if path.name.startswith("libgomp")]
    for path in [*needed, torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so"]:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    loaded_guard = ctypes.CDLL(str(guard), mode=ctypes.RTLD_GLOBAL)


def built(torch: Path) -> Path:
    """Return the guard for this torch and this source, building it where it is not there yet."""
    about = (SOURCE.read_bytes(), version("torch").encode(), str(torch).encode())
    guard = KEPT / f"guard-{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}.so"
    if guard.exists():
        return guard
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise NotPossible(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX) to build {SOURCE.name} with")
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        made = Path(folder) / guard.name
        include = torch / "include"
        command = [*compiler.split(), "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotPossible(f"{compiler} cannot build {SOURCE.name}: {done.stderr.strip()[-2000:]}")
        os.replace(made, guard)
    return guard


def current_device() -> int:
    """Return the device that is current in this thread."""
    assert loaded_guard is not None
    return int(loaded_guard.pretended_current_device())


def set_device(index: int) -> None:
    """Make a device current in this thread."""
    assert loaded_guard is not None
    loaded_guard.pretended_set_device(index)
