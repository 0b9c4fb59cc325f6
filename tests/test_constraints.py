"""constraints.txt: its releases run on the oldest Python that the package supports."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def too_new(pins: Mapping[str, str], python: str) -> dict[str, str]:
    """Return the Python that pinned releases ask for, if it is newer than `python`. Only installed releases are known."""
    found = {}
    for name, pin in pins.items():
        try:
            held = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        needed = held.metadata.get("Requires-Python")
        if Version(held.version).public == pin and needed and not SpecifierSet(needed).contains(python):
            found[name] = needed
    return found


def test_the_pinned_releases_run_on_the_oldest_python() -> None:
    """With one that does not, pip looks for other releases of everything else, for an hour."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = re.fullmatch(r">=(\d+\.\d+)", project["requires-python"])
    assert oldest
    assert too_new(pins, f"{oldest[1]}.0") == {}
    # Control: on an older Python some do not run.
    assert "numpy" in too_new(pins, "3.8.0")
