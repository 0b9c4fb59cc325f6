"""A drafter with its own tokenizer, by shared tokens and by strings: the output has exactly the target's distribution, by enumeration of every draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, NodeKind, Proposal, chain, fixed_tree
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import chain_draft
from drafttrain.drafters.causal_lm.across_tokenizers import EncodedText
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.verification import walk
from drafttrain.target_model import Target
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from tests.conftest import random_llama
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_verification import EXACT, Script, distance, outcomes
from tests.marks import slow
from tests.small_tokenizers import letters

WORDS = ["a", "b", "ab"]
"""Of the target; the drafter has `ba` and `c` instead of `ab`, and another order."""
TARGET = letters(WORDS)
OWN = letters(["c", "ba", "b", "a"], order=[4, 3, 0, 2, 1])
PROMPT = [1, 2]


def pair(size: int = 4, *, strings: bool = False, seed: int = 2, **options: Any) -> tuple[Target, CausalLMDrafter]:
    target = Target(random_llama(vocab_size=size, num_layers=1).double(), TARGET, name="letters", fingerprint="")
    model = random_llama(vocab_size=5, num_layers=1, seed=seed).double()
    drafter = CausalLMDrafter(model, other=OtherTokenizer(TARGET, OWN), **options).eval()
    assert not strings or drafter.draft_strings()
    return target, drafter


def enumerated(
    depth: int, *, changed: Callable[[Proposal], Proposal] = lambda proposal: proposal, **options: Any
) -> tuple[Any, Any]:
    """Return the distribution of two tokens after the prompt, and the target's own, over all draws and decisions.

    Args:
        changed: What is done with a proposal before it is verified.
    """
    target, drafter = pair(**options)
    p = targets(target.model, levels=max(2, depth + 1))
    proposer = drafter.proposer(target)

    def run(script: Script) -> tuple[int, ...]:
        with pytest.MonkeyPatch.context() as patch:
            # Draws from exactly these distributions, one after the other in every possible way.
            patch.setattr(chain_draft, "draw_each", lambda probs_NR, _: [drawn(script, row_R) for row_R in probs_NR])
            proposer.begin([Context("0", list(PROMPT), len(PROMPT))], [])
            (proposal,) = proposer.propose(
                [Budget(depth, depth)], Sampling(1.0), [torch.Generator()], lambda step: True
            )
        drafted = proposal.tokens_N[1:].tolist()
        rows_NV = torch.stack([p[level][tuple(drafted[:level])] for level in range(len(drafted) + 1)])
        path, token = walk(changed(proposal), TargetProbs.of(rows_NV), script)  # type: ignore[arg-type]
        tokens = [*drafted[: len(path) - 1], token]
        while len(tokens) < 2:
            tokens.append(script.draw(p[len(tokens)][tuple(tokens)]))
        return tuple(tokens[:2])

    return outcomes(run), p


def drawn(script: Script, probs_R: Tensor) -> int:
    """Return a token that has a probability."""
    possible = probs_R.nonzero()[:, 0].tolist()
    return int(possible[script.draw(probs_R[possible])])


@torch.no_grad()
def targets(model: Any, *, levels: int) -> list[Tensor]:
    """Return p[0] of the first token, p[1][a] of the second after a, ..."""
    found, texts = [], torch.tensor([PROMPT])
    for level in range(levels):
        found.append(model(texts).logits[:, -1].softmax(-1).view(*[4] * (level + 1)))
        texts = torch.cat([texts.repeat_interleave(4, 0), torch.arange(4).repeat(len(texts))[:, None]], dim=1)
    return found


def test_only_shared_tokens_are_drafted_with_their_whole_probability():
    target, drafter = pair()
    proposer = drafter.proposer(target)
    proposer.begin([Context("0", list(PROMPT), 2)], [])
    (proposal,) = proposer.propose([Budget(3, 3)], Sampling(1.0), [torch.Generator()], lambda step: True)
    assert proposal.q_rows_RV is not None
    assert proposal.q_rows_RV.shape == (3, 4)
    torch.testing.assert_close(proposal.q_rows_RV.sum(-1), torch.ones(3, dtype=torch.float64))
    # The target's "ab" is no token of the drafter.
    assert (proposal.q_rows_RV[:, TARGET.convert_tokens_to_ids("ab")] == 0).all()
    # The drafter reads "ab" as "a", "b": its ids 1 and 2.
    with torch.no_grad():
        whole_W = drafter.model(torch.tensor([[1, 2]])).logits[0, -1]
    shared_R = torch.tensor(OWN.convert_tokens_to_ids(["<|end|>", "a", "b"]))
    torch.testing.assert_close(proposal.q_rows_RV[0, :3], whole_W[shared_R].softmax(-1))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_output_has_exactly_the_targets_distribution(depth):
    found, p = enumerated(depth)
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert distance(found, p) < EXACT


DRAFTED = {19: ["ba", "c", "c"], 27: ["a", "b", "<|end|>"]}
"""What drafters of these seeds draft: one token that is two of the target's and one that it lacks, or two that it joins."""


@pytest.mark.parametrize(("seed", "tokens"), [(19, ["b", "a"]), (27, ["ab", "<|end|>"])])
def test_the_output_of_string_verification_has_exactly_the_targets_distribution(seed, tokens):
    verified = []

    def seen(proposal: Proposal) -> Proposal:
        verified.append(TARGET.convert_ids_to_tokens(proposal.tokens_N[1:].tolist()))
        return proposal

    found, p = enumerated(3, changed=seen, strings=True, seed=seed)
    assert all(one == tokens for one in verified)
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert distance(found, p) < EXACT


@pytest.mark.parametrize("seed", [19, 27])
def test_control_strings_that_are_tested_with_the_drafters_probability(seed):
    """The probability of an own token is not that of the target's first token of its text: a test of p / q is biased."""
    _, drafter = pair(seed=seed)
    with torch.no_grad():
        q_W = drafter.model(torch.tensor([OWN.convert_tokens_to_ids(["a", "b"])])).logits[0, -1].softmax(-1)
    (first,) = OWN.convert_tokens_to_ids(DRAFTED[seed][:1])

    def with_q(proposal: Proposal) -> Proposal:
        root, token, *_ = proposal.tokens_N.tolist()
        q_V = torch.zeros(4, dtype=torch.float64)
        q_V[token] = q_W[first]
        return chain([root, token], kind=NodeKind.SAMPLED, q_rows_RV=q_V[None])

    assert distance(*enumerated(3, changed=with_q, strings=True, seed=seed)) > 0.01


def test_control_q_without_renormalisation():
    _, drafter = pair()
    with torch.no_grad():
        whole_W = drafter.model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    mass = float(whole_W[torch.tensor(OWN.convert_tokens_to_ids(["<|end|>", "a", "b"]))].sum())
    assert mass < 0.9

    def not_renormalised(proposal: Proposal) -> Proposal:
        return replace(proposal, q_rows_RV=proposal.q_rows_RV * mass)

    assert distance(*enumerated(1, changed=not_renormalised)) > 0.01


def test_control_a_map_of_ids_that_is_off_by_one():
    def shifted(proposal: Proposal) -> Proposal:
        return replace(proposal, q_rows_RV=proposal.q_rows_RV.roll(1, -1))

    assert distance(*enumerated(1, changed=shifted)) > 0.01


@pytest.mark.long
@pytest.mark.parametrize(("draft", "strings"), [("sampled", False), slow("greedy", False), ("greedy", True)])
def test_sampled_output_passes_a_test_against_the_target(draft, strings):
    tokenizer = letters(["a", "b", "c", "ab", "bc", "d", "e"])
    model = random_llama(num_layers=1, vocab_size=8, hidden_size=16).double()
    target = Target(model, tokenizer, name="letters", fingerprint="")
    own = OtherTokenizer(tokenizer, OWN)
    drafter = CausalLMDrafter(random_llama(vocab_size=5, num_layers=1, seed=2).double(), draft=draft, other=own).eval()
    assert not strings or drafter.draft_strings()
    assert chi_square(model, drafter.proposer(target), 1.0, target=target, samples=600) > 1e-3


@pytest.mark.parametrize("strings", [False, True])
def test_greedy_output_is_the_targets_own(strings):
    target, drafter = pair(strings=strings)
    prompts = [Prompt(str(n), TARGET("abba"[:n]).input_ids) for n in (1, 2, 4)]
    found = decode(target, drafter.proposer(target), prompts=prompts, new=30, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 30) for prompt in prompts]
    assert any(one.num_accepted for generation in found for one in generation.rounds)


def test_a_drafter_of_strings_drafts_what_it_does_not_share():
    target, drafter = pair(strings=True)
    # Its likeliest token is "ba" after every text.
    head = drafter.model.get_output_embeddings().weight
    states_D = drafter.model.model(torch.tensor([[1, 2]])).last_hidden_state[0, -1]
    with torch.no_grad():
        head[OWN.convert_tokens_to_ids("ba")] = 10 * states_D
    proposer = drafter.proposer(target)
    proposer.begin([Context("0", TARGET("b").input_ids, 1)], [])
    (proposal,) = proposer.propose([Budget(3, 3)], Sampling(0.0), [torch.Generator()], lambda step: True)
    assert TARGET.convert_ids_to_tokens(proposal.tokens_N.tolist()) == ["b", "b", "ab", "ab"]
    assert proposal.q_rows_RV is None


def test_branches_of_the_same_text_become_one():
    ba, a, b = OWN.convert_tokens_to_ids(["ba", "a", "b"])
    draft = fixed_tree(0, [(ba, 0), (b, 0), (a, 0), (a, 2), (b, 3)])
    context = Context("0", TARGET("b").input_ids, 1)
    made = EncodedText(OtherTokenizer(TARGET, OWN)).proposal(context, Budget(8, 3, 3), draft)
    # "ba" and "b", "a" are the same text; "a", "b" is one token.
    assert TARGET.convert_ids_to_tokens(made.tokens_N.tolist()) == ["b", "b", "a", "ab"]
    assert made.parents_N.tolist() == [-1, 0, 1, 0]
    few = EncodedText(OtherTokenizer(TARGET, OWN)).proposal(context, Budget(2, 3, 3), draft)
    assert few.parents_N.tolist() == [-1, 0, 1]
