"""DFlash2 in the loop: greedy identity, the walk against training, output distribution with rows of few tokens, trees, ledger."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafttrain.core.probability import normalized, residual
from drafttrain.core.proposals import DraftStep, NodeKind
from drafttrain.core.texts import Sampling
from drafttrain.eval import verification
from drafttrain.eval.ledger import Ledger
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target
from tests.drafters.test_dspark import all_logits
from tests.eval.test_domino_engine import (
    CHAIN,
    NEW,
    PROMPTS,
    TREE,
    Watching,
    decoded,
    distribution_of,
    drafted,
    fitted,
    written,
)
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

TOP = 3
DFLASH2: dict[str, Any] = {"conv_group_size": 8, "selector_rank": 8, "selector_top_k": TOP, "block_size": 5}


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


@functools.cache
def trained_briefly(target: Target) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    drafter = block_drafter(target, "dflash2", **DFLASH2, anchors=64)
    torch.nn.init.normal_(drafter.candidate_selector.predecessor_codebook, std=0.5)
    torch.nn.init.normal_(drafter.candidate_selector.successor_codebook, std=0.5)
    return fitted(target, drafter, num_steps=30)


@pytest.mark.parametrize("policy", [CHAIN, TREE])
def test_greedy_output_is_the_targets_own_together_and_alone(target, policy):
    drafter = trained_briefly(target)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2


def test_the_walk_has_the_logits_of_training_and_hands_over_its_rows(target):
    """Each token of a sampled chain is drawn from the row of training after the same tokens: 0 outside of the candidates."""
    drafter, policy = trained_briefly(target), Watching()
    made = drafted(target, drafter, Sampling(temperature=0.7), policy)
    tokens = [3, 4, 5, *made.tokens_N.tolist()]
    wanted_KV = all_logits(target, drafter, [*tokens, 0, 0])[3]
    found_KV = torch.stack([step.logits_V for step in policy.steps])
    assert len(found_KV) == drafter.num_depths
    torch.testing.assert_close(found_KV, wanted_KV, rtol=0, atol=1e-10)
    assert set(made.kinds_N[1:].tolist()) == {NodeKind.SAMPLED.value}
    assert made.q_rows_RV is not None
    torch.testing.assert_close(made.q_rows_RV, (found_KV / 0.7).softmax(-1))
    assert (made.q_rows_RV > 0).sum(-1).tolist() == [TOP] * 4
    assert [float(row[token]) > 0 for row, token in zip(made.q_rows_RV, tokens[4:], strict=True)] == [True] * 4
    # The control: after another first draft token, the row of the second differs.
    other = all_logits(target, drafter, [*tokens[:4], (tokens[4] + 1) % 250, *tokens[5:], 0, 0])[3]
    seen = wanted_KV[1].isfinite()
    assert (other - wanted_KV)[1, seen].abs().max() > 1e-3


def test_a_node_has_children_among_its_candidates_only(target):
    """Trees of five children a node, of three candidates; the second level has the rows of chains with their tokens."""
    drafter = trained_briefly(target)
    steps: list[DraftStep] = []
    made = drafted(target, drafter, Sampling(), Tree(40, 5, 3), lambda step: steps.append(step) or True)
    parents = made.parents_N.tolist()
    assert max(parents.count(node) for node in range(len(parents))) == TOP
    second = [step for step in steps if step.depth == 2]
    assert len({step.token for step in second}) == TOP
    for step in second:
        wanted_V = all_logits(target, drafter, [3, 4, 5, 6, step.token, 0, 0, 0])[3, 1]
        torch.testing.assert_close(step.logits_V, wanted_V, rtol=0, atol=1e-10)


def test_every_weight_that_a_round_reads_is_in_the_ledger(target):
    drafter, ledger = trained_briefly(target), Ledger()
    decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    _, first, *_ = [event for event in ledger.events if event.model == "drafter"]
    size = lambda *parts: sum(8 * p.numel() for part in parts for p in part.parameters())  # noqa: E731
    columns = 2 * 2 * 2 * 6 * 8 * (len(PROMPTS[2].tokens) - 1)
    # Of the codebooks, a token's row and those of the candidates.
    walk = 4 * (size(drafter.candidate_selector.hidden_projection) + 8 * 8 * (1 + TOP))
    block = size(drafter.layers, drafter.norm) + 257 * 32 * 8 + 2 * 32 * 8
    assert first.bytes_read == block + walk + columns


# ---------------------------------------------------------------- the output distribution


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and drafters of three candidates among all of them or among 5."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)

    def drafter(vocabulary: int | None) -> Any:
        settings = DFLASH2 | {"taps": [1, 2], "mask_token_id": 7, "draft_vocab_size": vocabulary, "block_size": 4}
        made = block_drafter(target, "dflash2", scale=0.6, **settings)
        made.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
        return made

    return target, drafter


@pytest.mark.long
@pytest.mark.parametrize("vocabulary", [slow(None), 5])
def test_the_output_has_the_targets_distribution(small, vocabulary):
    target, made = small
    assert distribution_of(target, made(vocabulary).proposer(target)) > 1e-3


@pytest.mark.long
def test_control_a_residual_over_the_candidates_only_changes_the_output(small, monkeypatch):
    target, made = small

    def truncated(target_V: Tensor, drafter_V: Tensor) -> Tensor:
        excess_V = (target_V - drafter_V).clamp_min(0.0) * (drafter_V > 0)
        return normalized(excess_V) if excess_V.any() else residual(target_V, drafter_V)

    monkeypatch.setattr(verification, "residual", truncated)
    assert distribution_of(target, made(None).proposer(target)) < 1e-3
