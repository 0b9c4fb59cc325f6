"""P-EAGLE in the loop: greedy identity, output distribution, replay, batches, the cache, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.proposals import NodeKind, Proposal
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.eagle.cache import EagleCache
from drafttrain.drafters.p_eagle.decoding import DecodingPEagle
from drafttrain.drafters.p_eagle.proposer import PEagleProposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_target
from tests.drafters.p_eagle_models import p_eagle
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_dflash_engine import Watching
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
"""One prompt has a single token: there are no features of it yet."""
NEW = 20
CHAIN, TREE = FixedLength(), Tree(12, 3, 3)


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


@functools.cache
def trained_briefly(target: Target) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    drafter = p_eagle(target, draft_vocab_size=200)
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    loss = losses.build(losses.entry("forward_kl").settings())
    for step in range(40):
        optimizer.zero_grad()
        batch_loss(drafter, loss, replace(batch, step=step), vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    proposer = arguments.pop("proposer", None) or drafter.proposer(target, arguments.pop("listener", None))
    return decode(target, proposer, policy=policy, **arguments)


@pytest.mark.parametrize("policy", [slow(CHAIN), slow(Confidence()), TREE])
def test_greedy_output_is_the_targets_own_together_and_alone(target, policy):
    """With low and with high acceptance; in a batch every prompt has the same rounds as alone."""
    unskilled = decoded(target, p_eagle(target), policy, new=8)
    assert [g.tokens for g in unskilled] == [list(text[:8]) for text in written(target)]
    drafter = trained_briefly(target)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2
    if not isinstance(policy, Confidence):  # which stops drafting where it would be wrong
        assert [one for g in together for one in g.rounds if 0 < one.num_accepted < one.max_depth], (
            "a path that is accepted in part is what tests the cache"
        )


def drafted_logits(target: Target, drafter: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits of decoding, round by round; those of training's forward over the final text at the same rows)."""
    policy = Watching(4)
    (found,) = decoded(target, drafter, policy, prompts=PROMPTS[2:], **options)
    text = torch.tensor([[*found.prompt_tokens, *found.tokens]])
    batch, _ = pack([Record("", text[0].tolist(), [True] * text.shape[1])], width=text.shape[1], weight_of_step=1.0)
    batch = replace(batch, target=target.read(text, batch.positions_BT, drafter.needs()))
    with torch.no_grad():
        drafted = drafter(batch)
        trained = torch.stack([drafted.logits_BTV(depth)[0] for depth in sorted(drafted.states_BTD)], dim=1)
    row, wanted = len(found.prompt_tokens) - 2, []
    for one in found.rounds:
        wanted += list(trained[row, : one.num_draft_tokens])
        row += one.num_accepted + 1
    return torch.stack(policy.seen)[:, : trained.shape[-1]], torch.stack(wanted)


def test_decoding_computes_what_training_does(target):
    ours, wanted = drafted_logits(target, trained_briefly(target))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


class StaleCache(EagleCache):
    """The wrong variant: where a mask slot stood, its keys and values stay although the real token is known by now."""

    stale = 0

    def commit(self, key_BGNd: Any, value_BGNd: Any, sizes: Any) -> Any:
        start, count = self.lengths[0], min(self.stale, sizes[0])
        old = [states[:, :, start : start + count].clone() for states in self._columns._states]
        found = super().commit(key_BGNd, value_BGNd, sizes)
        for states, before in zip(self._columns._states, old, strict=False):
            states[:, :, start : start + count] = before
        return found

    def add_drafts(self, key_BGNd: Any, value_BGNd: Any) -> Any:
        self.stale = key_BGNd.shape[2]
        return super().add_drafts(key_BGNd, value_BGNd)


def test_control_mask_slots_that_stay_in_the_cache_break_the_identity(target):
    class Keeping(DecodingPEagle):
        def begin(self, num_sequences: int) -> None:
            self._caches = [StaleCache(num_sequences) for _ in self._layers]

    drafter = trained_briefly(target)
    proposer = drafter.proposer(target)
    proposer._layers = Keeping(drafter, device=target.device)
    ours, wanted = drafted_logits(target, drafter, proposer=proposer)
    assert float((ours[:4] - wanted[:4]).abs().max()) < 1e-10  # the first round
    assert float((ours - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, num_draft_tokens):
    drafter = trained_briefly(target)
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)), prompts=PROMPTS[1:])
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    rows = replay_rows(target, drafter, texts, Sampling(), num_depths=num_draft_tokens)
    assert [expected_rounds(row, num_draft_tokens) for row in rows] == pytest.approx([len(g.rounds) for g in found])
    # The control: another draft length does not agree.
    other = replay_rows(target, drafter, texts, Sampling(), num_depths=4)
    wrong = [expected_rounds(row, 4 - num_draft_tokens) for row in other]
    assert wrong != pytest.approx([len(g.rounds) for g in found])


def test_a_chain_is_fixed_at_every_temperature(target):
    """Its nodes are the same at each temperature, and are marked FIXED; a batch samples what each prompt samples alone."""
    drafter, found = trained_briefly(target), {}

    class Watched(PEagleProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            proposals = super().propose(*arguments)
            found.setdefault(arguments[1].temperature, proposals)
            assert all(set(one.kinds_N[1:].tolist()) <= {NodeKind.FIXED.value} for one in proposals)
            return proposals

    for temperature in (0.0, 1.0):
        options = {"proposer": Watched(drafter, target), "temperature": temperature}
        together = decoded(target, drafter, **options)
        alone = [decoded(target, drafter, prompts=[one], **options)[0] for one in PROMPTS]
        assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [one.tokens_N.tolist() for one in found[0.0]] == [one.tokens_N.tolist() for one in found[1.0]]


def test_a_budget_of_more_tokens_than_it_was_trained_for_is_cut(target):
    drafter = trained_briefly(target)
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(9)))
    assert max(one.num_draft_tokens for g in found for one in g.rounds) == drafter.num_depths


def test_every_pass_of_the_drafter_is_in_the_ledger(target):
    """One pass a round; bytes are counted by hand."""
    drafter, ledger = trained_briefly(target), Ledger()
    (generation,) = decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    drafting = sum(one.num_draft_tokens > 0 for one in generation.rounds)
    prefill, first, second = [event for event in ledger.events if event.model == "drafter"][:3]
    assert ledger.calls("drafter") == drafting
    cached = len(PROMPTS[2].tokens) - 2
    masks = generation.rounds[0].num_draft_tokens - 1
    assert (prefill.prefill, prefill.shape.num_tokens, prefill.shape.context) == (True, cached, 0)
    assert (first.shape.num_tokens, first.shape.context, first.shape.num_layers) == (1 + masks, cached, 2)
    accepted = generation.rounds[0].num_accepted
    assert (second.shape.num_tokens, second.shape.context) == (accepted + 1 + masks, cached + 1)
    size = lambda *modules: sum(8 * p.numel() for m in modules for p in m.parameters())  # noqa: E731
    column, row = 2 * 2 * 2 * 8 * 8, 32 * 8
    layers, head = size(drafter.fc, drafter.midlayer, drafter.layers), size(drafter.norm, drafter.lm_head)
    assert prefill.bytes_read == layers + (row + column) * cached
    assert first.bytes_read == layers + head + row + column * (cached + 1 + masks)
    assert second.bytes_read == layers + head + row * (accepted + 1) + column * (cached + accepted + 2 + masks)


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and a drafter with 5 of them."""
    target = eagle_target(vocab_size=8, num_layers=3, hidden_size=16)
    drafter = p_eagle(
        target, taps=[1, 2], mask_token_id=7, draft_vocab_size=5, num_heads=2, num_kv_heads=1, num_depths=3, scale=0.5
    )
    drafter.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
    return target, drafter


@pytest.mark.long
@pytest.mark.parametrize("policy", [None, Tree(5, 2, 3)])
def test_the_output_has_the_targets_distribution(small, policy):
    target, drafter = small
    assert distribution_of(target, drafter.proposer(target), policy) > 1e-3


@pytest.mark.long
def test_control_an_argmax_that_is_called_a_draw_changes_the_output(small):
    """The same tokens as SAMPLED with the slots' own distributions: the law of a draw is not that of an argmax."""
    target, drafter = small

    class Wrong(PEagleProposer):
        def propose(self, budgets: Any, sampling: Any, generators: Any, more: Any) -> list[Proposal]:
            rows: list[list[torch.Tensor]] = [[] for _ in self._contexts]

            def noted(step: Any) -> Any:
                answer = more(step)
                if answer:
                    rows[step.sequence].append(step.logits_V)
                return answer

            proposals = super().propose(budgets, sampling, generators, noted)
            vocabulary = self._draft.vocabulary
            return [
                replace(
                    one,
                    kinds_N=one.kinds_N.new_tensor([0] + [NodeKind.SAMPLED.value] * one.num_draft_tokens),
                    q_rows_RV=vocabulary.probs(torch.stack(row), sampling, size=8),
                    q_row_N=torch.tensor([*range(one.num_draft_tokens), -1]),
                )
                if row
                else one
                for one, row in zip(proposals, rows, strict=True)
            ]

    assert distribution_of(target, Wrong(drafter, target)) < 1e-3


def distribution_of(target: Target, proposer: Any, policy: Any = None) -> float:
    return chi_square(target.model, proposer, 1.0, samples=800, target=target, policy=policy)
