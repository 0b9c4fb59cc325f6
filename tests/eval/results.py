"""Complete results with made-up figures, for tests of their readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from drafttrain.eval.interval import Interval
from drafttrain.eval.result import (
    FORMAT,
    AtTemperature,
    DrafterFigures,
    EvaluatedDrafter,
    EvaluatedTarget,
    Machine,
    PairedComparison,
    PlainFigures,
    Provenance,
    Result,
    Seconds,
    Speedup,
    VllmFigures,
)

INTERVAL = Interval(1.5, 1.4, 1.6, 8)


def figures(**changes: Any) -> DrafterFigures:
    """Return figures of a drafter with five draft tokens per round."""
    made = DrafterFigures(
        length={"kind": "fixed", "num_draft_tokens": 5},
        block_efficiency=INTERVAL,
        draft_acceptance_rate=0.1,
        acceptance_by_position=[0.5],
        conditional_acceptance=[0.5],
        acceptance_histogram={"0": 1},
        mbsu=1.0,
        target_calls=1,
        drafter_calls=1,
        target_calls_per_token=1.0,
        discarded_draft_tokens_per_token=1.0,
        tokens_per_second=INTERVAL,
        speedup=Speedup(1.5, 1.4, 1.6, 8, baseline="plain decoding, same engine"),
        seconds=Seconds(1.0, 1.0, 1.0, 3.0),
        vllm=VllmFigures(1, 5, 1, 2.0, 0.2, [0.5]),
        slices={},
        prompts=[],
        samples=[],
        alpha=INTERVAL,
        replay={},
        exactness="distribution",
    )
    return replace(made, **changes)


def result(
    drafters: Mapping[str, DrafterFigures] | None = None,
    *,
    comparisons: Mapping[str, PairedComparison] | None = None,
    about: EvaluatedDrafter | None = None,
) -> Result:
    """Return an evaluation of drafters by name at temperature 0; the first one is judged."""
    drafters = drafters if drafters is not None else {"drafter": figures()}
    return Result(
        format=FORMAT,
        target=EvaluatedTarget("the/target", "0", "float32"),
        drafters={name: about or EvaluatedDrafter(name, "medusa", 1, None, None, "the/target") for name in drafters},
        settings={"length": {"kind": "fixed", "num_draft_tokens": 5}},
        num_prompts=2,
        exactness="distribution",
        temperatures=[AtTemperature(0.0, PlainFigures(1, 1, 1.0), drafters, comparisons or {})],
        provenance=Provenance([], "", "", "", {}, Machine("", "", 1)),
        trainer_loaded=False,
        seconds=1.0,
    )
