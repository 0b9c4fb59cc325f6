"""Domino in the loop: greedy identity, the walk against training, output distribution, trees, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafttrain.core.proposals import Context, DraftStep, NodeKind, Proposal, chain
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.dflash.walk_proposer import WalkProposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.losses import losses
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target
from tests.drafters.test_dspark import all_logits
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
NEW = 16
DOMINO: dict[str, Any] = {"gru_hidden_dim": 8, "emb_dim": 6, "block_size": 4}
CHAIN, TREE = FixedLength(FixedLengthSettings(4)), Tree(12, 3, 3)
ARMS = [(True, CHAIN), (False, CHAIN), (True, TREE)]


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


@functools.cache
def trained_briefly(target: Target, shift_label: bool, vocabulary: int | None = None) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts, with its schedule."""
    settings = DOMINO | {"sample_from_anchor": shift_label, "draft_vocab_size": vocabulary, "anchors": 64}
    drafter = block_drafter(target, "domino", **settings)
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    return fitted(target, drafter, num_steps=30)


def fitted(target: Target, drafter: Any, *, num_steps: int) -> Any:
    """Return a drafter after cross-entropy on the target's text after the prompts."""
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    for step in range(num_steps):
        optimizer.zero_grad()
        here = replace(batch, target=seen, step=step, num_steps=num_steps)
        batch_loss(drafter, losses.build(CrossEntropySettings()), here, vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    proposer = drafter.proposer(target, arguments.pop("listener", None))
    return decode(target, proposer, policy=policy, **arguments)


@pytest.mark.parametrize(("shift_label", "policy"), ARMS)
def test_greedy_output_is_the_targets_own_together_and_alone(target, shift_label, policy):
    drafter = trained_briefly(target, shift_label)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2


class Watching(FixedLength):
    """Stores every draft step that it is asked for."""

    def __init__(self) -> None:
        super().__init__(FixedLengthSettings(4))
        self.steps: list[DraftStep] = []

    def more(self, step: DraftStep) -> bool:
        self.steps.append(step)
        return super().more(step)


def drafted(target: Target, drafter: Any, sampling: Sampling, policy: Any, more: Any = None) -> Proposal:
    """Return the proposal after four tokens."""
    tokens = [3, 4, 5, 6]
    context, proposer = Context("a", tokens, 4), drafter.proposer(target)
    proposer.begin([context], [target.read(torch.tensor([tokens[:3]]), torch.arange(3)[None], drafter.needs())])
    generators = [torch.Generator().manual_seed(1)]
    made: list[Proposal] = proposer.propose([policy.budget(context)], sampling, generators, more or policy.more)
    return made[0]


@pytest.mark.parametrize("shift_label", [True, False])
def test_the_walk_has_the_logits_of_training_and_hands_over_its_rows(target, shift_label):
    """Each token of a sampled chain is drawn from the row of training after the same tokens."""
    drafter, policy = trained_briefly(target, shift_label), Watching()
    made = drafted(target, drafter, Sampling(temperature=0.7), policy)
    tokens = [3, 4, 5, *made.tokens_N.tolist()]
    wanted_KV = all_logits(target, drafter, [*tokens, 0, 0])[3]
    found_KV = torch.stack([step.logits_V for step in policy.steps])
    assert len(found_KV) == drafter.num_depths
    torch.testing.assert_close(found_KV, wanted_KV, rtol=0, atol=1e-10)
    assert set(made.kinds_N[1:].tolist()) == {NodeKind.SAMPLED.value}
    assert made.q_rows_RV is not None
    torch.testing.assert_close(made.q_rows_RV, (found_KV / 0.7).softmax(-1))
    # The control: after another first draft token, later rows differ.
    other = all_logits(target, drafter, [*tokens[:4], (tokens[4] + 1) % 250, *tokens[5:], 0, 0])[3]
    assert (other - wanted_KV)[1:].abs().amax(-1).min() > 1e-3


def test_the_children_of_a_node_depend_on_all_its_tokens(target):
    """In a tree, the second level has the rows of chains with their tokens."""
    drafter, policy = trained_briefly(target, True), Tree(12, 3, 3)
    steps: list[DraftStep] = []
    drafted(target, drafter, Sampling(), policy, lambda step: steps.append(step) or True)
    second = [step for step in steps if step.depth == 2]
    assert len({step.token for step in second}) == 3
    for step in second:
        wanted_V = all_logits(target, drafter, [3, 4, 5, 6, step.token, 0, 0, 0])[3, 1]
        torch.testing.assert_close(step.logits_V, wanted_V, rtol=0, atol=1e-10)


def test_every_weight_that_a_round_reads_is_in_the_ledger(target):
    drafter, ledger = trained_briefly(target, True), Ledger()
    decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    _, first, *_ = [event for event in ledger.events if event.model == "drafter"]
    size = lambda *parts: sum(8 * p.numel() for part in parts for p in part.parameters())  # noqa: E731
    columns = 2 * 2 * 2 * 6 * 8 * (len(PROMPTS[2].tokens) - 1)
    walk = 4 * size(drafter.prefix_gru, drafter.embed_proj)
    block = size(drafter.layers, drafter.norm) + 257 * 32 * 8 + 2 * 32 * 8
    assert first.bytes_read == block + walk + columns


# ---------------------------------------------------------------- the output distribution


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and drafters with 5 of them, whose corrections matter."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)

    def drafter(shift_label: bool) -> Any:
        settings = DOMINO | {"taps": [1, 2], "mask_token_id": 7, "draft_vocab_size": 5}
        made = block_drafter(target, "domino", scale=0.6, sample_from_anchor=shift_label, **settings)
        made.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
        return made

    return target, drafter


def distribution_of(target: Target, proposer: Any) -> float:
    return chi_square(target.model, proposer, 1.0, samples=800, target=target)


@pytest.mark.long
@pytest.mark.parametrize("shift_label", [True, slow(False)])
def test_the_output_has_the_targets_distribution(small, shift_label):
    target, made = small
    assert distribution_of(target, made(shift_label).proposer(target)) > 1e-3


@pytest.mark.long
def test_control_other_rows_than_those_drawn_from_change_the_output(small):
    """Tokens drawn from the corrected logits, handed over with sharper rows than they were drawn from."""
    target, made = small

    class Wrong(WalkProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            return [self.misstated(one) for one in super().propose(*arguments)]

        def misstated(self, one: Proposal) -> Proposal:
            if one.q_rows_RV is None:
                return one
            rows_RV: Tensor = one.q_rows_RV**4
            rows_RV = rows_RV / rows_RV.sum(dim=-1, keepdim=True)
            return chain(one.tokens_N.tolist(), kind=NodeKind.SAMPLED, q_rows_RV=rows_RV)

    sizes: dict[str, Any] = {"vocab_size": 8, "num_tokens": 8, "device": target.device}
    assert distribution_of(target, Wrong(made(True), **sizes)) < 1e-3
