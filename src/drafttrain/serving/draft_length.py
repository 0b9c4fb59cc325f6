"""How many tokens to draft in an engine: the length that an evaluation measured to be the fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import CheckpointError
from drafttrain.eval.result import Result, read_result


@dataclass(frozen=True)
class DraftLength:
    """One draft length, and its expected figures."""

    num_draft_tokens: int
    block_efficiency: float
    mbsu: float
    """Memory-bound speed-up; it grows with block efficiency and falls with the cost of drafting."""


def best_length(result: Result, *, most: int | None = None) -> DraftLength:
    """Return the chain length with the highest memory-bound speed-up, at temperature 0 if that was evaluated.

    A round with K draft tokens is assumed to read as many bytes as 1 + c K plain calls, with the evaluation's own c.

    Args:
        most: The longest draft that the drafter can make; None: any.

    Raises:
        CheckpointError: No chain of fixed length was evaluated, or its figures are inconsistent.
    """
    try:
        return max(_lengths(result, most=most), key=lambda one: one.mbsu)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"eval.json: no draft length can be computed from it ({why}). Evaluate again.") from error


def _lengths(result: Result, *, most: int | None) -> list[DraftLength]:
    arms = [arm for arm in result.greedy_or_first.drafters.values() if arm.length["kind"] == "fixed" and arm.replay]
    if not arms:
        raise CheckpointError(
            "eval.json: no chain of fixed length was evaluated that replay can compute. Evaluate with eval.length.kind: fixed and "
            "eval.layer_parallel_size: 1."
        )
    figures = arms[0]
    drafted = figures.vllm.num_draft_tokens / figures.vllm.num_drafts
    cost = (figures.vllm.mean_acceptance_length / figures.mbsu - 1) / drafted
    lengths = [
        DraftLength(int(key), replayed.value, replayed.value / (1 + cost * int(key)))
        for key, replayed in figures.replay.items()
        if most is None or int(key) <= most
    ]
    return [one for one in lengths if not math.isnan(one.mbsu)]


def read_evaluation(folder: Path) -> Result:
    """Return the evaluation of a drafter folder, from that folder or from its run folder.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    for path in (folder / "eval.json", folder.parent / "eval.json"):
        if path.is_file():
            return read_result(path)
    raise CheckpointError(f"{folder}: no eval.json here or in its run folder. Run: drafttrain eval {folder}")
