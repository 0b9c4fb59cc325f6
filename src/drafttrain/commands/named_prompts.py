"""Prompts that the arguments of a command name."""

from __future__ import annotations

from collections.abc import Sequence


def prompts_named_twice(prompts: str | None, overrides: Sequence[str]) -> list[str]:
    """Return what is wrong if both `--prompts` and an override name prompts; empty: nothing is."""
    if prompts is None or not any(override.startswith("eval.prompts=") for override in overrides):
        return []
    return ["--prompts and eval.prompts both name prompts: remove one"]
