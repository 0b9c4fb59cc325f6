"""DFlash in the loop: greedy identity, output distribution, replay, batches, the context cache, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafttrain.core.proposals import DraftStep, NodeKind, Proposal
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.dflash.cache import ContextCache
from drafttrain.drafters.dflash.proposer import BlockProposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.block_models import block_drafter, block_target
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_eagle_engine import Tree
from tests.marks import only, slow
from tests.target_model.test_target import ARCHITECTURES

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
"""One prompt has a single token: its first block has no context."""
NEW = 24
CHAIN, TREE = FixedLength(), Tree(12, 3, 3)
JETSPEC: dict[str, Any] = {"causal": True, "sample_from_anchor": True, "draft_vocab_size": 200}
ARMS = [({}, CHAIN), slow({}, Confidence()), slow({}, TREE), slow(JETSPEC, CHAIN), (JETSPEC, TREE)]


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


def trained_briefly(target: Target, **settings: Any) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    return _trained_briefly(target, tuple(settings.items()))


@functools.cache
def _trained_briefly(target: Target, settings: tuple[tuple[str, Any], ...]) -> Any:
    drafter = block_drafter(target, **dict(settings) | {"anchors": 64})
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    loss = losses.build(losses.entry("forward_kl").settings())
    for _ in range(40):
        optimizer.zero_grad()
        batch_loss(drafter, loss, batch, vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    proposer = drafter.proposer(target, arguments.pop("listener", None))
    return decode(target, proposer, policy=policy, **arguments)


@pytest.mark.parametrize(("settings", "policy"), ARMS)
def test_greedy_output_is_the_targets_own_together_and_alone(target, settings, policy):
    """With low and with high acceptance; in a batch every prompt has the same rounds as alone."""
    unskilled = decoded(target, block_drafter(target, **settings), policy, new=8)
    assert [g.tokens for g in unskilled] == [list(text[:8]) for text in written(target)]
    drafter = trained_briefly(target, **settings)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2
    if isinstance(policy, Confidence):
        return  # it stops drafting where it would be wrong
    assert [one for g in together for one in g.rounds if 0 < one.num_accepted < one.max_depth], (
        "a path that is accepted in part is what tests the cache"
    )


@pytest.mark.parametrize("name", only(["qwen3", "gpt_neox"], ARCHITECTURES))
def test_greedy_output_is_the_targets_own_on_every_architecture(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).double().eval()
    other = Target(model, byte_tokenizer(), name=name, fingerprint="")
    prompts = [Prompt("0", [5, 6]), Prompt("1", [9, 8, 7, 6, 5])]
    drafter = block_drafter(other, taps=None, mask_token_id=1)
    found = decoded(other, drafter, prompts=prompts, new=8)
    assert [g.tokens for g in found] == [greedy(other, prompt, 8) for prompt in prompts]


class Watching(FixedLength):
    """Stores the logits of every draft token that it is asked for."""

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__(FixedLengthSettings(num_draft_tokens))
        self.seen: list[torch.Tensor] = []

    def more(self, step: DraftStep) -> bool:
        self.seen.append(step.logits_V)
        return super().more(step)


def drafted_logits(target: Target, drafter: Any, policy: Watching) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits of decoding, round by round; those of training's forward over the final text at the same roots)."""
    (found,) = decoded(target, drafter, policy, prompts=PROMPTS[2:])
    text = torch.tensor([[*found.prompt_tokens, *found.tokens]])
    batch, _ = pack([Record("", text[0].tolist(), [True] * text.shape[1])], width=text.shape[1], weight_of_step=1.0)
    batch = replace(batch, target=target.read(text, batch.positions_BT, drafter.needs()))
    with torch.no_grad():
        drafted = drafter(batch)
        trained = torch.stack([drafted.logits_BTV(depth)[0] for depth in sorted(drafted.states_BTD)], dim=1)
    place, wanted = len(found.prompt_tokens) - 1, []
    for one in found.rounds:
        wanted += list(trained[place, : one.num_draft_tokens])
        place += one.num_accepted + 1
    return torch.stack(policy.seen)[:, : trained.shape[-1]], torch.stack(wanted)


@pytest.mark.parametrize("settings", [{}, {"causal": True, "sample_from_anchor": True}])
def test_a_block_in_training_has_the_logits_of_the_proposer(target, settings):
    """The cache grows by the root and the accepted tokens of each round."""
    drafter = trained_briefly(target, **settings)
    ours, wanted = drafted_logits(target, drafter, Watching(drafter.num_depths))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_control_keys_of_other_positions_break_the_identity(target, monkeypatch):
    drafter, append = trained_briefly(target), ContextCache.append
    monkeypatch.setattr(
        ContextCache,
        "append",
        lambda self, context, sizes: append(self, [(keys.roll(1, dims=2), values) for keys, values in context], sizes),
    )
    ours, wanted = drafted_logits(target, drafter, Watching(drafter.num_depths))
    assert float((ours - wanted).abs().max()) > 1e-2


def test_a_budget_cuts_the_chain_and_not_the_block(target):
    """The first token's logits are those of the whole block; the control runs a block of the budget's size."""
    drafter = trained_briefly(target)
    ours, wanted = drafted_logits(target, drafter, Watching(1))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)
    short = block_drafter(target, block_size=2)
    short.load_state_dict(drafter.state_dict())
    ours, _ = drafted_logits(target, short, Watching(1))
    assert float((ours[0] - wanted[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("settings", [{}, JETSPEC])
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, settings, num_draft_tokens):
    drafter = trained_briefly(target, **settings)
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)))
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    for depths in (num_draft_tokens, 0):
        rows = replay_rows(target, drafter, texts, Sampling(), num_depths=depths)
        if len(rows[0].accepted_TK[0]) > 1:
            expected = [expected_rounds(row, num_draft_tokens) for row in rows]
            assert expected == pytest.approx([len(g.rounds) for g in found])
    # The control: another draft length does not agree.
    assert [expected_rounds(row, 4 - num_draft_tokens) for row in rows] != pytest.approx([len(g.rounds) for g in found])


@pytest.mark.parametrize("policy", [slow(CHAIN), TREE])
def test_a_chain_is_fixed_at_every_temperature(target, policy):
    """Its nodes are the same at each temperature, and are marked FIXED; a batch samples what each prompt samples alone."""
    drafter, found = trained_briefly(target), {}

    class Watched(BlockProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            proposals = super().propose(*arguments)
            found.setdefault(arguments[1].temperature, proposals)
            assert all(set(one.kinds_N[1:].tolist()) <= {NodeKind.FIXED.value} for one in proposals)
            return proposals

    drafter.proposer_class = Watched
    try:
        for temperature in (0.0, 1.0):
            together = decoded(target, drafter, policy, temperature=temperature)
            alone = [decoded(target, drafter, policy, prompts=[one], temperature=temperature)[0] for one in PROMPTS]
            assert [g.tokens for g in together] == [g.tokens for g in alone]
    finally:
        del drafter.proposer_class
    assert [one.tokens_N.tolist() for one in found[0.0]] == [one.tokens_N.tolist() for one in found[1.0]]


def test_a_tree_of_jetspec_accepts_more_than_its_chain(target):
    drafter = trained_briefly(target, causal=True)
    rounds = [sum(len(g.rounds) for g in decoded(target, drafter, policy)) for policy in (CHAIN, Tree(24, 3, 4))]
    assert rounds[1] < rounds[0]


def test_every_pass_of_the_drafter_is_in_the_ledger(target):
    """One pass over the block a round, over the context where it is new; bytes are counted by hand."""
    drafter, ledger = trained_briefly(target), Ledger()
    calls = {"fc": 0, "norm": 0}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name, module in (("fc", drafter.fc), ("norm", drafter.norm))
    ]
    (generation,) = decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    for handle in handles:
        handle.remove()
    drafting = sum(one.num_draft_tokens > 0 for one in generation.rounds)
    prefill, first, second = [event for event in ledger.events if event.model == "drafter"][:3]
    assert calls == {"fc": drafting, "norm": drafting}
    assert ledger.calls("drafter") == drafting
    cached = len(PROMPTS[2].tokens) - 1
    assert (prefill.prefill, prefill.shape.num_tokens, prefill.shape.context) == (True, cached, 0)
    assert (first.shape.num_tokens, first.shape.context, first.shape.num_layers) == (4, cached, 2)
    accepted = generation.rounds[0].num_accepted
    assert (second.shape.num_tokens, second.shape.context) == (4 + 1 + accepted, cached)
    size = lambda *modules: sum(8 * p.numel() for m in modules for p in m.parameters())  # noqa: E731
    column, row, head = 2 * 2 * 2 * 6 * 8, 32 * 8, 257 * 32 * 8
    block = size(drafter.layers, drafter.norm) + head + 2 * row
    keys = [each for layer in drafter.layers for each in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    context = size(drafter.fc, drafter.hidden_norm, *keys)
    assert prefill.bytes_read == context + column * cached
    assert first.bytes_read == block + column * cached
    assert second.bytes_read == context + block + column * (cached + 1 + accepted)


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and a drafter with 5 of them."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)
    drafter = block_drafter(target, taps=[1, 2], mask_token_id=7, draft_vocab_size=5, scale=0.5)
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

    class Wrong(BlockProposer):
        def propose(self, budgets: Any, sampling: Any, generators: Any, more: Any) -> list[Proposal]:
            rows: list[list[torch.Tensor]] = [[] for _ in self._contexts]

            def noted(step: DraftStep) -> Any:
                answer = more(step)
                if answer:
                    rows[step.sequence].append(step.logits_V)
                return answer

            proposals = super().propose(budgets, sampling, generators, noted)
            vocabulary = self._vocabulary
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

    sizes: dict[str, Any] = {"vocab_size": 8, "num_tokens": 8, "device": target.device}
    assert distribution_of(target, Wrong(drafter, **sizes), None) < 1e-3


def distribution_of(target: Target, proposer: Any, policy: Any) -> float:
    return chi_square(target.model, proposer, 1.0, samples=800, target=target, policy=policy)
