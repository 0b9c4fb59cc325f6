"""Parameters of a matrix that only the long tests try."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one set of parameters, left to `make test-full`."""
    return pytest.param(*values, marks=pytest.mark.slow)
