"""Lone rounds: what is known of a draft is what was drafted, and what the length policy wanted."""

from __future__ import annotations

from typing import Any

import pytest

from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.advice import Candidate
from drafttrain.eval.interval import Interval
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.dyspec import DySpecSettings
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.rsd_c import RsdCSettings
from drafttrain.eval.length.rsd_s import RsdSSettings
from drafttrain.eval.length.sequoia import SequoiaSettings
from drafttrain.eval.length.static_tree import count_levels, count_nodes
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.lone_rounds import lone_rounds
from drafttrain.eval.settings import EvalSettings
from tests.eval.decoding import noisy, small_target

PROMPT = Prompt("0", [1, 2, 3])


def candidate(length: Any, temperature: float = 1.0) -> Candidate:
    target = small_target()
    drafter = CausalLMDrafter(noisy(target.model, 0.1)).eval()
    settings = EvalSettings(temperatures=[temperature])
    rounds = lone_rounds(drafter, target, PROMPT, settings, length=length, count=3)
    return Candidate({}, Interval(1.0, 1.0, 1.0, 1), False, rounds)


@pytest.mark.parametrize(
    ("length", "nodes", "depth", "width", "drawn"),
    [
        (FixedLengthSettings(3), 3, 3, 1, False),
        (TreeSettings(10, 3, 4), 10, 3, 4, False),
        (RsdSSettings(3, depth=2), 6, 2, 3, True),
        (RsdCSettings([2, 3]), 8, 2, 3, True),
        # A chain of 2 nodes: its depth and width are neither in its settings.
        (SequoiaSettings(2, acceptance=[0.9, 0.01]), 2, 2, 1, False),
    ],
)
def test_the_draft_of_a_round_is_the_policys_own(length: Any, nodes: int, depth: int, width: int, drawn: bool) -> None:
    draft = candidate(length).draft
    assert (draft.nodes, draft.depth, draft.width, draft.form is not None) == (nodes, depth, width, drawn)


def test_a_static_tree_has_the_depth_of_its_shape() -> None:
    length = SequoiaSettings(9, width=5, acceptance=[0.5, 0.2, 0.1])
    shape = length_policies.build(length).shape
    draft = candidate(length).draft
    # Not the 9 levels and 5 children that the settings allow.
    assert (draft.nodes, draft.depth, draft.width) == (count_nodes(shape), count_levels(shape), 3)
    assert draft.depth < 9


def test_a_tree_that_ends_early_counts_as_deep_as_it_was_drafted() -> None:
    found = candidate(DySpecSettings(6, depth=16, width=2))
    assert found.num_draft_tokens == 6
    assert found.draft.depth == round(sum(one.draft.depth for one in found.rounds) / 3) < 6
