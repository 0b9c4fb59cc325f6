"""An evaluation of a drafter with given block efficiencies by draft length."""

from __future__ import annotations

from dataclasses import replace

from drafttrain.eval.interval import Interval
from drafttrain.eval.result import Result, VllmFigures
from tests.eval import results


def evaluation(replay: dict[int, float], *, length: int, cost: float) -> Result:
    """Return an evaluation whose chains of `length` cost 1 + `cost` a draft token."""
    taken = replay[length]
    arm = results.figures(
        length={"kind": "fixed", "num_draft_tokens": length},
        replay={str(k): Interval(value, value, value) for k, value in replay.items()},
        mbsu=taken / (1 + cost * length),
        vllm=VllmFigures(100, 100 * length, 0, taken, 0.0, []),
    )
    return results.result({"tree": replace(arm, length={"kind": "tree"}, replay={}), "drafter": arm})
