"""How many tokens to draft in an engine, from what an evaluation measured, and the command that serves with so many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json


@dataclass(frozen=True)
class DraftLength:
    """One length, and what it promises."""

    num_draft_tokens: int
    block_efficiency: float
    mbsu: float
    """Memory-bound speed-up; it grows with block efficiency and falls with the cost of drafting."""


def best_length(result: Mapping[str, Any], *, most: int | None = None) -> DraftLength:
    """Return the chain length of the highest memory-bound speed-up, at temperature 0 where it was evaluated.

    The bytes of a round with K draft tokens are taken as 1 + c K plain calls; c is that of the evaluation's own length.

    Args:
        result: What `evaluate` returned.
        most: The longest draft that the drafter has.

    Raises:
        CheckpointError: No chain of fixed length was evaluated.
    """
    try:
        return _best_length(result, most=most)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"eval.json: not what drafttrain eval writes ({said}): evaluate the drafter again"
        ) from error


def _best_length(result: Mapping[str, Any], *, most: int | None) -> DraftLength:
    parts = result["temperatures"]
    part = next((one for one in parts if one["temperature"] == 0), parts[0])
    # An evaluation of an earlier version has one length, which its settings tell.
    only = result["settings"]["length"]
    arms = [arm for arm in part["drafters"].values() if arm.get("length", only)["kind"] == "fixed" and arm["replay"]]
    if not arms:
        raise CheckpointError(
            "eval.json: no chain of fixed length was evaluated (eval.length.kind: fixed): nothing to choose from"
        )
    figures = arms[0]
    drafted = figures["vllm"]["num_draft_tokens"] / figures["vllm"]["num_drafts"]
    cost = (figures["vllm"]["mean_acceptance_length"] / figures["mbsu"] - 1) / drafted
    lengths = [
        DraftLength(int(key), replayed["value"], replayed["value"] / (1 + cost * int(key)))
        for key, replayed in figures["replay"].items()
        if most is None or int(key) <= most
    ]
    return max(lengths, key=lambda one: one.mbsu)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return the evaluation of a drafter folder: in it, or in the run folder that it lies in.

    Raises:
        CheckpointError: There is none.
    """
    for path in (folder / "eval.json", folder.parent / "eval.json"):
        if path.is_file():
            return read_json(path)
    raise CheckpointError(f"{folder}: no eval.json here or in its run folder: drafttrain eval {folder}")
