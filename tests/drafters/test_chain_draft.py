"""Chains of a round: limits, the length policy, draws and rows of q, of logits that are known one by one or all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.probability import draw, sampling_probs
from drafttrain.core.proposals import Budget, Context, DraftStep, More, NodeKind, Proposal
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.chain_draft import ChainDraft, Chains

V, NUM_TOKENS = 12, 11
OWN = torch.tensor([7, 2, 9, 4, 10])
ROOTS = [3, 8, 5]


def table(rows: int = V, width: int = V) -> Tensor:
    """Return logits after each of the target's tokens."""
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def begin(
    depths: Sequence[int] = (4, 4, 4),
    more: Callable[[DraftStep], Any] = lambda step: True,
    *,
    temperature: float = 1.0,
    draft: str = "sampled",
    own: Tensor | None = None,
) -> Chains:
    contexts = [Context(str(root), [1, root], 1) for root in ROOTS]
    generators = [torch.Generator().manual_seed(root) for root in ROOTS]
    made = ChainDraft(DraftVocabulary(own, num_tokens=NUM_TOKENS), V, draft)
    return made.begin(contexts, [Budget(depth, depth) for depth in depths], Sampling(temperature), generators, more)


def walked(chains: Chains, logits_VW: Tensor, states_VD: Tensor | None = None) -> list[Proposal]:
    """Draft token by token; the logits are those after the newest token."""
    while chains.growing:
        newest = torch.tensor(chains.newest)
        assert chains.inputs == [
            [chains.newest[chains.growing.index(i)]] if i in chains.growing else [] for i in range(3)
        ]
        chains.extend(logits_VW[newest][:, None], None if states_VD is None else states_VD[newest][:, None])
    return chains.proposals()


def by_hand(root: int, depth: int, logits_VW: Tensor, ids: list[int], *, fixed: bool) -> tuple[list[int], list[Tensor]]:
    """Return the tokens of one chain and their rows of q, drafted on its own."""
    generator, tokens, rows = torch.Generator().manual_seed(root), [root], []
    for _ in range(depth):
        probs = sampling_probs(logits_VW[tokens[-1], : len(ids)], Sampling(0.0 if fixed else 1.0))
        place = int(probs.argmax()) if fixed else draw(probs, generator)
        tokens.append(ids[place])
        rows.append(torch.zeros(V, dtype=torch.float64).index_put((torch.tensor(ids),), probs))
    return tokens, rows


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is wanted if found is None or wanted is None else torch.equal(found, wanted)


@pytest.mark.parametrize("own", [None, OWN], ids=["whole", "cut"])
@pytest.mark.parametrize("fixed", [False, True])
def test_chains_that_are_drafted_together_are_those_drafted_alone(own: Tensor | None, fixed: bool) -> None:
    logits, depths = table(), (3, 0, 4)
    ids = list(range(NUM_TOKENS)) if own is None else own.tolist()
    found = walked(begin(depths, draft="greedy" if fixed else "sampled", own=own), logits)
    for proposal, root, depth in zip(found, ROOTS, depths, strict=True):
        tokens, rows = by_hand(root, depth, logits, ids, fixed=fixed)
        assert proposal.tokens_N.tolist() == tokens
        drawn = not fixed and depth > 0
        assert proposal.kinds_N.tolist()[1:] == [(NodeKind.SAMPLED if drawn else NodeKind.FIXED).value] * depth
        wanted = torch.stack(rows) if drawn else None
        assert same(proposal.q_rows_RV, wanted)


def test_temperature_zero_drafts_what_greedy_drafts() -> None:
    cold, greedy = walked(begin(temperature=0.0), table()), walked(begin(draft="greedy"), table())
    assert [one.tokens_N.tolist() for one in cold] == [one.tokens_N.tolist() for one in greedy]
    assert [one.q_rows_RV for one in cold] == [None] * 3


def test_logits_that_are_known_at_once_give_the_chains_of_logits_one_by_one() -> None:
    """If the distributions depend on the depth alone, as those of Medusa's heads."""
    logits_KV = table(4)
    chains = begin()
    chains.extend(logits_KV.expand(3, 4, V))
    assert chains.growing == []
    assert [len(tokens) for tokens in chains.drafted] == [4, 4, 4]
    at_once, chains = chains.proposals(), begin()
    for depth in range(4):
        chains.extend([logits_KV[depth : depth + 1]] * len(chains.growing))
        assert [len(tokens) for tokens in chains.drafted] == [1, 1, 1]
    for one, other in zip(at_once, chains.proposals(), strict=True):
        assert one.tokens_N.tolist() == other.tokens_N.tolist()
        assert one.q_rows_RV is not None
        assert same(one.q_rows_RV, other.q_rows_RV)


def test_the_policy_is_asked_before_every_token_and_sees_no_token_that_is_not_drafted() -> None:
    asked: list[DraftStep] = []
    answers: dict[int, dict[int, Any]] = {0: {3: False}, 1: {2: More.LAST}, 2: {}}

    def more(step: DraftStep) -> Any:
        asked.append(step)
        return answers[step.sequence].get(step.depth, True)

    logits, states = table(), torch.arange(V)[:, None]
    found = walked(begin(more=more), logits, states)
    tokens = [one.tokens_N.tolist() for one in found]
    assert [len(one) - 1 for one in tokens] == [2, 2, 4]
    assert [(step.sequence, step.depth) for step in asked] == [
        *((0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (0, 3), (2, 3), (2, 4))
    ]
    for step in asked:
        newest = tokens[step.sequence][step.depth - 1]
        assert step.token == newest
        assert torch.equal(step.logits_V, logits[newest, :NUM_TOKENS])
        assert same(step.hidden_D, states[newest])


def test_at_once_the_policy_sees_the_root_and_no_draft_token() -> None:
    asked: list[DraftStep] = []

    def more(step: DraftStep) -> Any:
        asked.append(step)
        return step.depth < 3 or (More.LAST if step.sequence else False)

    chains = begin(more=more)
    chains.extend(table(4).expand(3, 4, V))
    assert [len(tokens) for tokens in chains.drafted] == [2, 3, 3]
    assert [(step.depth, step.token) for step in asked] == [
        (d, root if d == 1 else None) for root in ROOTS for d in (1, 2, 3)
    ]


def test_a_chain_that_draws_with_the_stream_of_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the first test."""
    chains = begin()
    first, second, _ = chains._chains
    first.generator, second.generator = second.generator, first.generator
    alone, _ = by_hand(ROOTS[0], 4, table(), list(range(NUM_TOKENS)), fixed=False)
    assert walked(chains, table())[0].tokens_N.tolist() != alone
