"""drafttrain trains the drafters of speculative decoding and measures what they yield."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drafttrain.api import cascade as cascade
    from drafttrain.api import evaluate as evaluate
    from drafttrain.api import load_drafter as load_drafter
    from drafttrain.api import load_target as load_target
    from drafttrain.api import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "cascade", "evaluate", "load_drafter", "load_target", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python API when it is first used: `import drafttrain` alone loads no torch."""
    if name in __all__:
        from drafttrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'drafttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
