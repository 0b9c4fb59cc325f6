"""Layer skipping in the loop: the target's own output, rounds as replayed, work in the ledger; and SWIFT, which searches there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.layer_skip.module import LayerSkipDrafter, LayerSkipSettings
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers import Surroundings, is_warm, make
from drafttrain.eval.proposers.swift import Swift, SwiftSettings
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.target_model import Target
from drafttrain.target_model.sublayers import Skipped, Sublayers
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.test_layer_skip import idle
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy

BESIDE = "target without some sublayers"
SKIPPED = Skipped(attention=(3,), mlp=(1,))


def wrapped(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def drafter_of(target: Target, skipped: Skipped = SKIPPED, **settings: Any) -> LayerSkipDrafter:
    return LayerSkipDrafter(target, LayerSkipSettings(**settings), skipped)


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=5).double())


@pytest.fixture(scope="module")
def texts(target: Target) -> list[list[int]]:
    return [greedy(target, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("policy", [FixedLength(), TreeLength(TreeSettings(num_draft_tokens=8, depth=3, width=3))])
def test_greedy_output_is_the_targets_own(target, texts, policy, batched):
    proposer = drafter_of(target).proposer(target)
    groups = [PROMPTS] if batched else [[prompt] for prompt in PROMPTS]
    found = [
        g for group in groups for g in decode(target, proposer, prompts=group, policy=policy, new=24, stop_tokens=())
    ]
    assert [one.tokens for one in found] == texts
    assert sum(len(one.rounds) for one in found) < sum(map(len, texts)), "some draft tokens are accepted"
    assert any(one.num_accepted < one.num_draft_tokens for g in found for one in g.rounds), "and some are rejected"


@pytest.mark.long
@pytest.mark.parametrize("spoiled", [False, True])
def test_sampled_output_has_the_targets_distribution(spoiled):
    """Control: rows of q that belong to the next set of sublayers."""
    model = random_llama(num_layers=4, vocab_size=8, hidden_size=16).double()
    target = wrapped(model)
    proposer: Any = drafter_of(target, Skipped(attention=(1, 2), mlp=(2,))).proposer(target)
    if spoiled:
        propose = proposer.propose

        def with_other_rows(*arguments: Any) -> Any:
            found = propose(*arguments)
            return [
                one if one.q_rows_RV is None else replace(one, q_rows_RV=one.q_rows_RV.roll(1, dims=-1))
                for one in found
            ]

        proposer.propose = with_other_rows
    p_value = chi_square(model, proposer, 1.0, samples=1000, target=target)
    assert (p_value < 1e-3) == spoiled


@pytest.mark.parametrize("count", [2, 4])
def test_replay_counts_the_rounds_of_the_loop(target, count):
    """Control: rounds of one draft token fewer."""
    drafter = drafter_of(target, Skipped(mlp=(3,)))
    policy = FixedLength(FixedLengthSettings(count))
    found = decode(target, drafter.proposer(target), policy=policy, new=32, stop_tokens=())
    texts = [Text(one.id, list(one.prompt_tokens), list(one.tokens)) for one in found]
    rows = replay_rows(target, drafter, texts, Sampling(), num_depths=count)
    rounds = [len(one.rounds) for one in found]
    assert rounds == [expected_rounds(row, count) for row in rows]
    assert rounds != [expected_rounds(row, count - 1) for row in rows]


def test_the_ledger_leaves_out_the_weights_of_skipped_sublayers(target):
    ledger = Ledger()
    proposer = drafter_of(target).proposer(target, ledger.append)
    decode(target, proposer, prompts=PROMPTS[:1], new=8, stop_tokens=(), listener=ledger.append)
    plain = Ledger()
    nothing = drafter_of(target, Skipped()).proposer(target, plain.append)
    decode(target, nothing, prompts=PROMPTS[:1], new=8, stop_tokens=(), listener=plain.append)
    (ours, whole) = (one.rounds(BESIDE)[0] for one in (ledger, plain))
    modules = [module for part in Sublayers(target.model).modules(SKIPPED) for module in part]
    skipped = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    assert whole.work.weight_bytes - ours.work.weight_bytes == skipped
    assert whole.work.cache_bytes * 4 == ours.work.cache_bytes * 5, "one of five attentions reads no keys and values"
    assert (whole.shape.num_layers, ours.shape.num_layers) == (5, 4)
    assert ledger.calls("target") < 8
    assert {event.model for event in ledger.rounds()} == {"target", BESIDE}


# ---------------------------------------------------------------- SWIFT


IDLE = Skipped(attention=(2,), mlp=(4,))


@pytest.fixture(scope="module")
def half_idle() -> Target:
    return wrapped(idle(random_llama(num_layers=6).double(), IDLE))


def swift(target: Target, **settings: Any) -> Swift:
    chosen = SwiftSettings(**{"ratio": 0.25, "window": 8, "bayes_every": 5} | settings)
    made = make(chosen, Surroundings(target))
    assert isinstance(made, Swift)
    return made


PROMPT = [Prompt("one", [1, 2, 3])]


@pytest.mark.long
def test_it_finds_idle_sublayers_while_it_writes(half_idle):
    """From then on every draft token is accepted. Control: a search of one step stays at its first set."""
    proposer = swift(half_idle)
    (found,) = decode(half_idle, proposer, prompts=PROMPT, new=90, stop_tokens=())
    assert found.tokens == greedy(half_idle, PROMPT[0], 90)
    assert proposer.skipped == IDLE
    assert all(one.num_accepted == one.num_draft_tokens for one in found.rounds[-3:])
    short = swift(half_idle, max_steps=1)
    (other,) = decode(half_idle, short, prompts=PROMPT, new=90, stop_tokens=())
    assert other.tokens == found.tokens
    assert short.skipped != IDLE
    assert len(other.rounds) > len(found.rounds)


def test_it_is_deterministic_and_forgets(half_idle):
    cold, warm = swift(half_idle), swift(half_idle, warm=True)
    assert (is_warm(cold.settings), is_warm(warm.settings)) == (False, True)
    prompts = [Prompt(str(i), [1 + i, 2, 3]) for i in range(2)]

    def rounds(proposer: Swift, prompt: Prompt) -> list[int]:
        (found,) = decode(half_idle, proposer, prompts=[prompt], new=18, stop_tokens=())
        return [one.num_accepted for one in found.rounds]

    alone = [rounds(swift(half_idle), prompt) for prompt in prompts]
    assert [rounds(cold, prompt) for prompt in prompts] == alone, "a prompt does not depend on those before it"
    first = [rounds(warm, prompt) for prompt in [*prompts, *prompts]]
    assert first[0] == alone[0]
    assert first[2:] != alone, "control: a search that continues does depend on them"
    warm.forget()
    assert rounds(warm, prompts[0]) == alone[0]


def test_sequences_together_share_a_set_and_the_output_stays_the_targets_own(half_idle):
    proposer = swift(half_idle, window=6)
    found = decode(half_idle, proposer, new=24, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(half_idle, prompt, 24) for prompt in PROMPTS]


@pytest.mark.long
def test_its_sampled_output_has_the_targets_distribution():
    model = random_llama(num_layers=4, vocab_size=8, hidden_size=16).double()
    target = wrapped(model)
    assert chi_square(model, swift(target, ratio=0.5, window=2), 1.0, samples=1000, target=target) > 1e-3


def test_it_starts_with_the_drafters_set_or_refuses(half_idle):
    settings = SwiftSettings(start="drafter")
    assert settings.reads_drafter
    drafter = drafter_of(half_idle, IDLE)
    made: Any = make(settings, Surroundings(half_idle, drafter))
    assert made.skipped == IDLE
    with pytest.raises(CheckpointError, match="swift with start: drafter needs a drafter of kind layer_skip, got None"):
        make(settings, Surroundings(half_idle))


def test_scores_leave_no_trace_in_the_targets_cache(half_idle):
    """The target's call after a scoring gives the logits of the whole text."""
    proposer = swift(half_idle)
    rows: list[float] = []

    def compare(context: Any, _: Any) -> None:
        lm = proposer._beside.lm
        fresh = half_idle.model(torch.tensor([context.tokens[:-1]]), use_cache=True).past_key_values
        pairs = zip(fresh.layers, lm.cache.hf.layers, strict=True)
        rows.append(max(float((one.keys - other.keys).abs().max()) for one, other in pairs))

    from drafttrain.eval.acceptance.lossless import Lossless
    from drafttrain.eval.engine import Engine

    engine = Engine(
        half_idle,
        proposer,
        rule=Lossless(),
        policy=FixedLength(),
        sampling=Sampling(),
        max_new_tokens=30,
        stop_tokens=(),
    )
    engine.generate(PROMPT, on_round=compare)
    assert len(rows) > 3
    assert max(rows) < 1e-10
