"""Parameters of a matrix that the default tests leave to others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one set of parameters, left to `make test-full`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def long(*values: Any) -> Any:
    """Return one set of parameters, left to `make test-long`, which CI runs."""
    return pytest.param(*values, marks=pytest.mark.long)


def only(chosen: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return all names; those that are not chosen are left to `make test-full`."""
    kept = set(chosen)
    return [name if name in kept else slow(name) for name in names]
