"""Drafters that read features, in the loop: greedy identity, output distribution, replay, batches, cache, ledger."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafttrain.core import vocabulary
from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.eagle.proposer import EagleProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.chunked import row_losses
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.eagle_models import eagle_drafter, eagle_target
from tests.eval.decoding import chi_square, greedy
from tests.marks import only, slow
from tests.target_model.test_target import ARCHITECTURES

PROMPTS = [Prompt(str(i), list(range(1 + i, 2 + i + size))) for i, size in enumerate((0, 5, 11))]
"""One prompt has a single token: its first round has nothing to draft from."""


class Tree:
    """A length policy with one given tree."""

    def __init__(self, nodes: int, depth: int, width: int) -> None:
        self._budget = Budget(nodes, depth, width)

    def budget(self, context: Context) -> Budget:
        return self._budget

    def more(self, step: DraftStep) -> bool:
        return True

    def observe(self, verdict: Verdict) -> None:
        pass


NEW = 24
"""New tokens per prompt."""

CHAIN, TREE = FixedLength(), Tree(12, 4, 3)
ARMS = [
    slow("eagle3", {"draft_vocab_size": 200}, CHAIN),
    ("eagle3", {"fc_norm": True, "norm_output": True, "norm_before_residual": True}, CHAIN),
    slow("eagle3", {"norm_before_fc": True}, CHAIN),
    slow("eagle3", {"draft_vocab_size": 200}, Confidence()),
    ("eagle3", {"draft_vocab_size": 200}, TREE),
    ("eagle", {}, CHAIN),
    slow("eagle", {}, TREE),
]


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@functools.cache
def written(target: Target) -> tuple[tuple[int, ...], ...]:
    """Return the target's text after each prompt."""
    return tuple(tuple(greedy(target, prompt, NEW)) for prompt in PROMPTS)


def trained_briefly(kind: str, target: Target, **settings: Any) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    return _trained_briefly(kind, target, tuple(settings.items()))


@functools.cache
def _trained_briefly(kind: str, target: Target, settings: tuple[tuple[str, Any], ...]) -> Any:
    drafter = eagle_drafter(kind, target, **dict(settings))
    drafter.fit_vocabulary(lambda: np.bincount([token for text in written(target) for token in text], minlength=257))
    drafter.train()
    drafter.own = drafter.own | {"feature_noise": 0.0}
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = [[*prompt.tokens, *new] for prompt, new in zip(PROMPTS, written(target), strict=True)]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen), num_depths=3)
    loss = losses.build(losses.entry("forward_kl").settings())
    for _ in range(25):
        drafted = drafter(batch)
        loss_N, _ = row_losses(loss, drafted, align(drafted, batch), batch, vocab_size=257)
        optimizer.zero_grad()
        loss_N.sum().backward()
        optimizer.step()
    return drafter.eval()


def decode(target: Any, drafter: Any, policy: Any, *, prompts=PROMPTS, temperature=0.0, new=NEW, **options: Any) -> Any:
    engine = Engine(
        target,
        drafter.proposer(target, options.get("listener")),
        rule=Lossless(),
        policy=policy,
        sampling=Sampling(temperature),
        max_new_tokens=new,
        stop_tokens=(),
        **options,
    )
    return engine.generate(prompts)


@pytest.mark.parametrize(("kind", "settings", "policy"), ARMS)
def test_greedy_output_is_the_targets_own_together_and_alone(target, kind, settings, policy):
    """With low and with high acceptance; in a batch every prompt has the same rounds as alone."""
    unskilled = decode(target, eagle_drafter(kind, target, **settings), policy, new=8)
    assert [g.tokens for g in unskilled] == [list(text[:8]) for text in written(target)]
    drafter = trained_briefly(kind, target, **settings)
    together = decode(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decode(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2
    if isinstance(policy, Confidence):
        return  # it stops drafting where it would be wrong
    partly = [one for g in together for one in g.rounds if 0 < one.num_accepted < one.max_depth]
    assert partly, "a path that is accepted in part is what tests the cache"


@pytest.mark.parametrize("name", only(["llama", "gpt2"], ARCHITECTURES))
def test_greedy_output_is_the_targets_own_on_every_architecture(name):
    """Taps, embedding and head of other architectures than Llama; the drafters start from parts of the target."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).double().eval()
    other = Target(model, byte_tokenizer(), name=name, fingerprint="")
    prompts = [Prompt("0", [5, 6]), Prompt("1", [9, 8, 7, 6, 5])]
    for kind in ("eagle3", "eagle"):
        drafter = eagle_drafter(kind, other, **({"draft_vocab_size": 50} if kind == "eagle3" else {}))
        for policy in (CHAIN, TREE):
            found = decode(other, drafter, policy, prompts=prompts, new=8)
            assert [g.tokens for g in found] == [greedy(other, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("kind", ["eagle3", slow("eagle")])
def test_a_batch_samples_what_each_prompt_samples_alone(target, kind):
    drafter = trained_briefly(kind, target)
    for policy in (CHAIN, TREE):
        together = decode(target, drafter, policy, temperature=1.0)
        alone = [decode(target, drafter, policy, prompts=[prompt], temperature=1.0)[0] for prompt in PROMPTS]
        assert [g.tokens for g in together] == [g.tokens for g in alone]


@pytest.mark.parametrize(("kind", "settings"), [("eagle3", {"draft_vocab_size": 200}), ("eagle", {})])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
def test_greedy_replay_takes_the_rounds_of_the_loop(target, kind, settings, num_draft_tokens):
    """Training and proposer roll out the same draft: features of every slot, shifts, positions, vocabulary."""
    drafter = trained_briefly(kind, target, **settings)
    found = decode(target, drafter, FixedLength(FixedLengthSettings(num_draft_tokens)))
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    for depths in (num_draft_tokens, num_draft_tokens + 2):
        rows = replay_rows(target, drafter, texts, Sampling(), num_depths=depths)
        expected = [expected_rounds(r, num_draft_tokens) for r in rows]
        if depths > 1:
            assert expected == pytest.approx([len(g.rounds) for g in found])
    if num_draft_tokens == 1:  # the control: another draft length does not agree
        assert [expected_rounds(r, 2) for r in rows] != pytest.approx([len(g.rounds) for g in found])


def test_a_tree_accepts_more_than_a_chain_of_its_depth(target):
    drafter = trained_briefly("eagle3", target)
    chain = sum(len(g.rounds) for g in decode(target, drafter, FixedLength(FixedLengthSettings(4))))
    assert sum(len(g.rounds) for g in decode(target, drafter, Tree(24, 4, 4))) < chain


def test_the_cache_holds_the_slots_of_the_committed_text_made_of_true_features(target):
    """After every round the drafter's keys equal those computed from the committed text: no drafted state stays."""
    drafter = trained_briefly("eagle3", target)
    checked = 0

    class Watched(EagleProposer):
        def propose(self, *arguments: Any) -> Any:
            nonlocal checked
            proposals = super().propose(*arguments)
            for row, (context, length) in enumerate(zip(self._contexts, self._cache.lengths, strict=True)):
                if not proposals[row].num_draft_tokens:
                    continue  # what is not needed is read when it is
                assert length == len(context.tokens) - 1
                text = torch.tensor([context.tokens])
                positions = torch.arange(length)[None]
                seen = target.read(text[:, :-1], positions, drafter.needs())
                inputs, _ = drafter.entering(drafter.embed(text[:, 1:]), drafter.fused(drafter.features(seen)))
                _, key, value = drafter.layer.project(inputs, positions)
                for ours, theirs in zip(self._cache._columns.first(length), (key, value), strict=True):
                    torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-11)
                checked += 1
            return proposals

    proposer = Watched(drafter, target)
    for policy in (CHAIN, TREE):
        Engine(target, proposer, rule=Lossless(), policy=policy, sampling=Sampling(), max_new_tokens=NEW).generate(
            PROMPTS
        )
    assert checked > 20


def test_every_forward_of_the_drafter_is_in_the_ledger(target):
    """The layer runs once per draft token, the fusion of features once per round; bytes are counted by hand."""
    drafter = trained_briefly("eagle3", target, draft_vocab_size=200)
    ledger, policy = Ledger(), FixedLength(FixedLengthSettings(3))
    calls = {"fc": 0, "layer": 0, "head": 0}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name, module in (
            ("fc", drafter.fc),
            ("layer", drafter.midlayer.post_attention_layernorm),
            ("head", drafter.norm),
        )
    ]
    (generation,) = decode(target, drafter, policy, prompts=PROMPTS[2:], listener=ledger.append)
    for handle in handles:
        handle.remove()
    drafted = [one.num_draft_tokens for one in generation.rounds]
    assert ledger.calls("drafter") == sum(drafted) == calls["head"]
    assert calls["layer"] == ledger.calls("drafter") + 1  # and the prompt
    assert calls["fc"] == 1 + sum(1 for count in drafted if count)
    prefill, first, second = [event for event in ledger.events if event.model == "drafter"][:3]
    assert prefill.prefill
    assert (prefill.shape.num_tokens, first.shape.num_tokens, second.shape.num_tokens) == (
        len(PROMPTS[2].tokens) - 2,
        1,
        1,
    )
    size = lambda *modules: sum(8 * p.numel() for m in modules for p in m.parameters())  # noqa: E731
    slot, row = 2 * 16 * 8, 32 * 8
    layer, head, fusion = size(drafter.midlayer), size(drafter.norm, drafter.lm_head), size(drafter.fc)
    cached = len(PROMPTS[2].tokens) - 2
    assert first.bytes_read == layer + head + fusion + row + slot * (cached + 1)
    assert second.bytes_read == layer + head + row + slot * (cached + 2)


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and a drafter with 5 of them."""
    target = eagle_target(vocab_size=8, num_layers=3, hidden_size=16)
    drafter = eagle_drafter("eagle3", target, draft_vocab_size=5, scale=0.5)
    drafter.fit_vocabulary(lambda: np.array([3, 9, 0, 7, 0, 5, 4, 0]))
    return target, drafter


@pytest.mark.long
@pytest.mark.parametrize(("temperature", "policy"), [(1.0, None), (1.0, Tree(5, 2, 3))])
def test_the_output_has_the_targets_distribution_with_a_smaller_vocabulary(small, temperature, policy):
    target, drafter = small
    assert distribution_of(target, drafter, temperature, policy=policy) > 1e-3


def distribution_of(target: Any, drafter: Any, temperature: float, *, policy: Any = None) -> float:
    def arrange(engine: Engine) -> None:
        if policy is not None:
            engine.policy = policy

    return chi_square(target.model, drafter.proposer(target), temperature, samples=800, target=target, prepare=arrange)


@pytest.mark.long
def test_control_a_distribution_that_is_not_scattered_changes_the_output(small, monkeypatch):
    """The rows of q stay in the order of the drafter's own ids."""
    monkeypatch.setattr(
        vocabulary,
        "over_target_vocabulary",
        lambda probs, vocabulary, *, size: torch.nn.functional.pad(probs, (0, size - len(vocabulary))),
    )
    target, drafter = small
    assert distribution_of(target, drafter, 1.0) < 1e-3


@pytest.mark.long
def test_control_a_distribution_with_mass_on_missing_tokens_changes_the_output(small, monkeypatch):
    """The rows of q are normalized as if the missing tokens could be drawn."""
    scatter = vocabulary.over_target_vocabulary

    def spread(probs: Any, vocabulary: Any, *, size: int) -> Any:
        return 0.6 * scatter(probs, vocabulary, size=size) + 0.4 / size

    monkeypatch.setattr(vocabulary, "over_target_vocabulary", spread)
    target, drafter = small
    assert distribution_of(target, drafter, 1.0) < 1e-3
