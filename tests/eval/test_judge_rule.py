"""The judge's rule: lossless at delta 1, accepts all at delta 0, and never accepts less than the lossless rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Exactness, NodeKind, chain, fixed_chain
from drafttrain.core.random import stream
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.judge import Judge, JudgeRuleSettings
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.heads.judge import JudgeHead, JudgeSettings
from tests.eval.decoding import PROMPTS, V, decode, noisy
from tests.eval.test_engine import target as target


@pytest.fixture
def head(tmp_path: Path) -> str:
    torch.manual_seed(0)
    JudgeHead(JudgeSettings(drafter="d"), 32).save(tmp_path)
    return str(tmp_path)


def rule(head: str, delta: float | None) -> Judge:
    return Judge(JudgeRuleSettings(delta=delta, head=head))


def outputs(target: Any, rule: Any, temperature: float) -> list[Any]:
    proposer = ChainProposer(noisy(target.model, 0.05), target_vocab_size=V)
    return decode(target, proposer, temperature=temperature, rule=rule, stop_tokens=())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_delta_1_it_is_the_lossless_rule_token_for_token(target, head, temperature):
    lossless = [(one.tokens, one.rounds) for one in outputs(target, Lossless(), temperature)]
    assert [(one.tokens, one.rounds) for one in outputs(target, rule(head, 1.0), temperature)] == lossless
    # Control: at a lower delta the output differs.
    assert [(one.tokens, one.rounds) for one in outputs(target, rule(head, 0.5), temperature)] != lossless


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_delta_0_everything_is_accepted(target, head, temperature):
    for one in outputs(target, rule(head, 0.0), temperature):
        assert all(part.num_accepted == part.num_draft_tokens for part in one.rounds)
    lossless = outputs(target, Lossless(), temperature)
    assert not all(part.num_accepted == part.num_draft_tokens for one in lossless for part in one.rounds)


@pytest.mark.parametrize("kind", [NodeKind.FIXED, NodeKind.SAMPLED])
def test_it_accepts_what_the_lossless_rule_accepts_of_the_same_draft_and_more(head, kind):
    generator = torch.Generator().manual_seed(0)
    judge, longer, by_delta = rule(head, 0.5), 0, []
    for number in range(200):
        target_NV = torch.rand(6, 12, generator=generator).pow(3)
        target_NV /= target_NV.sum(-1, keepdim=True)
        drafter_RV = torch.rand(5, 12, generator=generator).pow(3)
        drafter_RV /= drafter_RV.sum(-1, keepdim=True)
        tokens = [0, *(int(torch.multinomial(row_V, 1, generator=generator)) for row_V in drafter_RV)]
        proposal = (
            fixed_chain(tokens[0], tokens[1:])
            if kind is NodeKind.FIXED
            else chain(tokens, kind=NodeKind.SAMPLED, q_rows_RV=drafter_RV)
        )
        hidden_ND = torch.randn(6, 32, generator=generator)
        lossless, _ = Lossless()(proposal, TargetProbs.of(target_NV), None, stream(0, number))
        kept, _ = judge(proposal, TargetProbs.of(target_NV), hidden_ND, stream(0, number))
        assert kept[: len(lossless)] == lossless
        longer += len(kept) > len(lossless)
        by_delta.append(
            [
                len(rule(head, d)(proposal, TargetProbs.of(target_NV), hidden_ND, stream(0, number))[0])
                for d in (0.2, 0.8)
            ]
        )
    assert longer > 20
    assert sum(low for low, _ in by_delta) > sum(high for _, high in by_delta)


def test_only_tokens_that_the_judge_passes_are_accepted_against_the_target(head):
    judge = rule(head, 0.5)
    hidden_ND = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    good_N = (judge.head.probability(hidden_ND) > 0.5).tolist()
    target_NV = torch.zeros(4, 6)
    target_NV[:, 5] = 1.0  # never a draft token
    path, token = judge(fixed_chain(0, [1, 2, 3]), TargetProbs.of(target_NV), hidden_ND, stream(0))
    passed = next((i for i in range(1, 4) if not good_N[i]), 4)
    assert path == list(range(passed))
    assert token == 5


def test_it_is_lossy_and_reads_one_layer(target, head):
    judge = rule(head, None)
    assert judge.exactness is Exactness.LOSSY
    assert judge.needs == TargetNeeds(hidden=(-1,))
    seen: list[Any] = []

    class Watching(Judge):
        def __call__(self, proposal: Any, target_probs_NV: Any, node_hidden_ND: Any, generator: Any) -> Any:
            seen.append((proposal.tokens_N.tolist(), node_hidden_ND))
            return super().__call__(proposal, target_probs_NV, node_hidden_ND, generator)

    (one,) = decode(
        target,
        ChainProposer(noisy(target.model, 0.05), target_vocab_size=V),
        rule=Watching(JudgeRuleSettings(head=head)),
        prompts=PROMPTS[1:2],
        new=12,
        stop_tokens=(),
    )
    tokens, hidden_ND = seen[0]
    text = torch.tensor([[*PROMPTS[1].tokens[:-1], *tokens]])
    whole = target.read(text, torch.arange(text.shape[1])[None], TargetNeeds(hidden=(2,))).hidden_BTD[2]
    torch.testing.assert_close(hidden_ND, whole[0, len(PROMPTS[1].tokens) - 1 :], rtol=0, atol=1e-9)
    assert len(one.tokens) == 12


def test_a_judge_of_another_width_is_refused(tmp_path, target):
    JudgeHead(JudgeSettings(drafter="d"), 16).save(tmp_path)
    with pytest.raises(CheckpointError, match="made for a target of width 16, this target has 32"):
        outputs(target, rule(str(tmp_path), 0.5), 0.0)
