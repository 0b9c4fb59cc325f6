"""Memory that is not used any more is returned."""

from __future__ import annotations

import weakref

from drafttrain.core.memory import return_memory


class Circle:
    """Holds itself."""

    def __init__(self) -> None:
        self.own = self


def test_what_only_a_circle_holds_is_freed():
    gone = weakref.ref(Circle())
    return_memory()
    assert gone() is None
