"""Free memory of this machine, or of the container that the process runs in."""

from __future__ import annotations

from pathlib import Path

MEMORY = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")


def free_host_bytes(memory: Path = MEMORY, container: Path = CONTAINER) -> int | None:
    """Return how many bytes can still be allocated on the host; None: not known."""
    known = [free for free in (_of_machine(memory), _of_container(container)) if free is not None]
    return min(known, default=None)


def _of_machine(memory: Path) -> int | None:
    try:
        lines = memory.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kilobytes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(number) * 1024 for number in kilobytes), None)


def _of_container(container: Path) -> int | None:
    """Return the bytes below the container's limit; its file cache counts as free."""
    try:
        limit = (container / "memory.max").read_text(encoding="utf-8").strip()
        used = int((container / "memory.current").read_text(encoding="utf-8"))
        counts = dict(line.split() for line in (container / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(counts.get("inactive_file", 0))
