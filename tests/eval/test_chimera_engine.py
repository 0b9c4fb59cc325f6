"""Chimera in the loop: greedy identity, output distribution, decoding equals training, replay, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.chimera import proposer as chimera_proposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.chimera_models import chimera
from tests.drafters.eagle_models import eagle_target
from tests.eval.decoding import chi_square, decode, greedy
from tests.eval.test_dflash_engine import Watching
from tests.eval.test_eagle_engine import Tree
from tests.marks import slow

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
"""One prompt has a single token: there are no features of it yet."""
NEW = 16
CHAIN, TREE = FixedLength(FixedLengthSettings(3)), Tree(10, 3, 3)


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
    drafter = chimera(target, draft_vocab_size=200)
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    loss = losses.build(losses.entry("forward_kl").settings())
    for _ in range(12):
        optimizer.zero_grad()
        batch_loss(drafter, loss, batch, vocab_size=257).total.backward()
        optimizer.step()
    return drafter.eval()


def decoded(target: Target, drafter: Any, policy: Any = CHAIN, **options: Any) -> Any:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "new": NEW, "stop_tokens": ()} | options
    return decode(target, drafter.proposer(target, arguments.get("listener")), policy=policy, **arguments)


@pytest.mark.parametrize("policy", [CHAIN, TREE])
def test_greedy_output_is_the_targets_own_together_and_alone(target, policy):
    """With low and with high acceptance; in a batch every prompt has the same rounds as alone."""
    unskilled = decoded(target, chimera(target), policy, new=6)
    assert [g.tokens for g in unskilled] == [list(text[:6]) for text in written(target)]
    drafter = trained_briefly(target)
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2
    assert [one for g in together for one in g.rounds if 0 < one.num_accepted < one.max_depth], (
        "a path that is accepted in part is what tests the cache"
    )


def drafted_logits(target: Target, drafter: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return (logits of decoding, round by round; those of training's forward over the accepted text; rows after accepted tokens)."""
    policy = Watching(3)
    (found,) = decoded(target, drafter, policy, prompts=PROMPTS[2:])
    text = torch.tensor([[*found.prompt_tokens, *found.tokens]])
    batch, _ = pack([Record("", text[0].tolist(), [True] * text.shape[1])], width=text.shape[1], weight_of_step=1.0)
    batch = replace(batch, target=target.read(text, batch.positions_BT, drafter.needs()))
    with torch.no_grad():
        drafted = drafter(batch)
        trained = torch.stack([drafted.logits_BTV(depth)[0] for depth in sorted(drafted.states_BTD)], dim=1)
    slot, first, ours, wanted = len(found.prompt_tokens) - 2, 0, [], []
    for one in found.rounds:
        # The first draft tokens up to the one that was rejected were drafted after the text itself.
        same = min(one.num_accepted + 1, one.num_draft_tokens)
        ours += policy.seen[first : first + same]
        wanted += list(trained[slot, :same])
        first += one.num_draft_tokens
        slot += one.num_accepted + 1
    return torch.stack(ours)[:, : trained.shape[-1]], torch.stack(wanted), [one.num_accepted for one in found.rounds]


def test_decoding_computes_what_training_does(target):
    ours, wanted, accepted = drafted_logits(target, trained_briefly(target))
    assert max(accepted) > 1, "only a token after an accepted one shows what a later step reads"
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_control_a_root_that_is_read_without_the_tokens_before_it_breaks_the_identity(target, monkeypatch):
    monkeypatch.setattr(chimera_proposer, "last_trigram", lambda text: [text[-1]] * 3)
    ours, wanted, _ = drafted_logits(target, trained_briefly(target))
    assert float((ours - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, num_draft_tokens):
    drafter = trained_briefly(target)
    found = decoded(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)), prompts=PROMPTS[1:])
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    rows = replay_rows(target, drafter, texts, Sampling())
    assert [expected_rounds(row, num_draft_tokens) for row in rows] == pytest.approx([len(g.rounds) for g in found])
    # The control: another draft length does not agree.
    wrong = [expected_rounds(row, 4 - num_draft_tokens) for row in rows]
    assert wrong != pytest.approx([len(g.rounds) for g in found])


def test_every_call_of_the_drafter_is_in_the_ledger(target):
    """One call a draft token; the first one also reads the target's new features. Bytes and operations are counted by hand."""
    drafter, ledger = trained_briefly(target), Ledger()
    (generation,) = decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    assert ledger.calls("drafter") == sum(one.num_draft_tokens for one in generation.rounds)
    prefill, first, second, third, next_round = [event for event in ledger.events if event.model == "drafter"][:5]
    cached, accepted = len(PROMPTS[2].tokens) - 1, generation.rounds[0].num_accepted
    assert [one.shape.num_tokens for one in (prefill, first, second)] == [cached, 1, 1]
    assert (next_round.shape.num_tokens, next_round.shape.context) == (accepted + 2, cached)
    size = lambda *modules: sum(8 * p.numel() for m in modules for p in m.parameters())  # noqa: E731
    column, rows, part = 2 * 2 * 8 * 8, 3 * 32 * 8, drafter.layer.self_attn
    projections = size(part.q_proj, part.k_proj, part.v_proj)
    whole = size(drafter.layer, drafter.fc, drafter.blocks, drafter.lm_heads[0])
    assert prefill.bytes_read == projections + column * cached
    assert first.bytes_read == whole + rows + column * (cached + 1)
    assert third.bytes_read == whole + rows + column * (cached + 3)
    assert next_round.bytes_read == whole + rows + column * (cached + accepted + 2)
    # Features pass through the projections alone.
    of_features = next_round.work.product_flops - first.work.product_flops
    assert of_features == 2 * (accepted + 1) * sum(p.weight.numel() for p in (part.q_proj, part.k_proj, part.v_proj))


@pytest.mark.parametrize("policy", [slow(None), Tree(5, 2, 3)])
def test_the_output_has_the_targets_distribution(policy):
    target = eagle_target(vocab_size=8, num_layers=3, hidden_size=16)
    drafter = chimera(target, draft_vocab_size=5, num_heads=2, num_kv_heads=1, scale=0.5)
    drafter.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
    assert chi_square(target.model, drafter.proposer(target), 1.0, samples=800, target=target, policy=policy) > 1e-3
