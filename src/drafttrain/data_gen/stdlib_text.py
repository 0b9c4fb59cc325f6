"""Text that every machine with Python has: the standard library's own source and documentation, split by module.

A top-level module is wholly train or wholly held out, by the hash of its name, so the split is the same on every machine and
a module that a later Python adds falls on one side without moving another.
"""

import functools
import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "turtledemo",
        "pydoc_data",
        "lib-dynload",
        "__pycache__",
        "config-3",
        "__phello__",
        "antigravity.py",
        "this.py",
    }
)
"""Tests, tables, generated files, and what is not the library."""

HELD_OUT_SHARE = 20
"""One module in this many is held out."""


def split_of(module: str) -> Split:
    """Return the side that a top-level module (or a documentation topic) is on."""
    digest = hashlib.sha256(f"drafttrain:{module}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0 else "train"


def documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every source file and documentation topic of one side, in one order on every machine."""
    for name, path in _sources(split):
        text = _readable(path)
        if len(text) >= 400:
            yield name, text
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        if split_of(f"topic:{name}") == split and len(text) >= 400:
            yield f"topic/{name}", text


@functools.cache
def _sources(split: Split) -> tuple[tuple[str, Path], ...]:
    """Return (id, path) of every source file of one side, sorted by paths."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        if split_of(parts[0].removesuffix(".py")) == split:
            found.append(("/".join(parts), path))
    return tuple(found)


def _readable(path: Path) -> str:
    """Return the file's text, or '' for one that is mostly a table of numbers or escapes."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    letters = sum(map(str.isalpha, text)) + sum(map(str.isspace, text))
    return text if letters > 0.6 * len(text) else ""
