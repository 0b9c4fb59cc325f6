"""Decoding with an imported drafter, and without one."""

from __future__ import annotations

from typing import Any

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target


def drafted_and_plain(drafter: Any, target: Target) -> tuple[list[list[int]], list[list[int]]]:
    """Return the greedy tokens of two prompts, with the drafter and by the target alone."""
    prompts = [Prompt(str(k), [5 + k, 80, 9]) for k in range(2)]

    def tokens(proposer: Any) -> list[list[int]]:
        engine = Engine(
            target,
            proposer,
            rule=Lossless(),
            policy=FixedLength(),
            sampling=Sampling(),
            max_new_tokens=12,
            stop_tokens=(),
        )
        return [list(one.tokens) for one in engine.generate(prompts)]

    return tokens(drafter.proposer(target)), tokens(NoDraft())
