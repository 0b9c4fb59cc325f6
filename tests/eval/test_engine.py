"""The loop on real (tiny, float64) models: greedy identity, output distribution, caches, ends of text, the ledger."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.causal_lm.decoding import DecodingLM
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.lenience import Lenience, LenienceSettings
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.metrics import counts_of, mbsu, totals_of
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import (
    PROMPTS,
    V,
    chi_square,
    decode,
    greedy,
    noisy,
    rounds_of_replay,
    small_target,
    standard_error,
)
from tests.marks import slow


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture(scope="module")
def proposers(target) -> dict[str, Any]:
    chain = lambda model, **k: ChainProposer(model, target_vocab_size=V, **k)  # noqa: E731
    return {
        "none": NoDraft(),
        "always right": chain(target.model),
        "nearly right": chain(noisy(target.model, 0.02)),
        "always wrong": chain(random_llama(seed=9, num_layers=1).double()),
        "greedy draft": chain(noisy(target.model, 0.02), draft="greedy"),
        "ngram": Ngram(),
    }


POLICIES: list[tuple[Any, bool]] = [
    (FixedLength(), True),
    (Confidence(), False),
    (FixedLength(FixedLengthSettings(50)), True),
]


@pytest.mark.parametrize("name", ["none", "always right", "nearly right", "always wrong", "greedy draft", "ngram"])
@pytest.mark.parametrize(
    ("policy", "together"), [*POLICIES, *(slow(policy, not together) for policy, together in POLICIES)]
)
def test_greedy_output_is_the_targets_own(target, proposers, name, policy, together):
    groups = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
    found = [g for group in groups for g in decode(target, proposers[name], prompts=group, policy=policy, new=24)]
    assert [g.tokens for g in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]


def test_a_perfect_draft_is_accepted_whole_and_nothing_is_drafted_past_the_end(target, proposers):
    for new in (1, 2, 6, 7, 12, 13):
        for generation in decode(target, proposers["always right"], new=new):
            assert len(generation.tokens) == new
            assert all(one.num_accepted == one.num_draft_tokens for one in generation.rounds)
            assert [one.num_emitted for one in generation.rounds][:-1] == [6] * (len(generation.rounds) - 1)
            assert all(one.start + one.num_draft_tokens + 1 <= new for one in generation.rounds)


@pytest.mark.parametrize("name", ["always right", "nearly right", "none"])
def test_an_end_of_text_inside_an_accepted_block_ends_the_text_there(target, proposers, name):
    for prompt, place in itertools.product(PROMPTS, (0, 3, 7)):
        plain = greedy(target, prompt, 24)
        stop = plain[place]
        (generation,) = decode(target, proposers[name], prompts=[prompt], stop_tokens=[stop], new=24)
        assert generation.tokens == plain[: plain.index(stop) + 1]
        last = generation.rounds[-1]
        assert last.reason == "eos"
        assert sum(one.num_emitted for one in generation.rounds) == len(generation.tokens)
        assert last.num_accepted <= last.num_emitted


def test_caches_hold_the_committed_text_after_every_round(target):
    """The next logits from the cache equal those computed from the committed text, for target and drafter."""
    drafter = noisy(target.model, 0.03)
    proposer = ChainProposer(drafter, target_vocab_size=V)
    engine = Engine(
        target, proposer, rule=Lossless(), policy=FixedLength(), sampling=Sampling(1.0), max_new_tokens=30, seed=3
    )
    checked = 0
    original = engine.advance

    def check(lm: Any, layers: Any, model: Any, live: Any) -> int:
        for row, sequence in enumerate(live):
            length = lm.lengths[row]
            text = torch.tensor([sequence.context.tokens[:length]])
            fresh = model(text, use_cache=True).past_key_values
            for (keys, values), theirs in zip(layers, fresh.layers, strict=True):
                torch.testing.assert_close(keys[row : row + 1, :, :length], theirs.keys, rtol=0, atol=1e-12)
                torch.testing.assert_close(values[row : row + 1, :, :length], theirs.values, rtol=0, atol=1e-12)
        return len(live)

    def watched(live: Any) -> None:
        nonlocal checked
        original(live)
        of_target = [(layer.keys, layer.values) for layer in engine._lm.cache.hf.layers]
        checked += check(engine._lm, of_target, target.model, live)
        assert isinstance(proposer._lm, DecodingLM)
        of_drafter = [layer.columns.first(max(proposer._lm.lengths)) for layer in proposer._lm._layers]
        check(proposer._lm, of_drafter, drafter, live)

    engine.advance = watched  # type: ignore[method-assign]
    engine.generate(PROMPTS)
    assert checked > 10


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    model = small_target().model
    return model, noisy(model, 0.15)


@pytest.mark.parametrize(
    ("draft", "temperature"), [("sampled", 1.0), slow("sampled", 0.5), slow("greedy", 1.0), ("greedy", 0.5)]
)
def test_the_output_has_the_targets_distribution(small, temperature, draft):
    model, drafter = small
    assert chi_square(model, ChainProposer(drafter, target_vocab_size=8, draft=draft), temperature) > 1e-3


@pytest.mark.long
def test_control_a_cache_rolled_back_by_one_too_few_changes_the_distribution(small):
    """The first rejected token stays in the target's cache: the same test must detect it."""

    def spoil(engine: Engine) -> None:
        keep = engine._lm.keep

        def too_much(paths: Any) -> None:
            read = [a - b for a, b in zip(engine._lm.cache.lengths, engine._lm.cache.kept, strict=True)]
            keep([[*path, len(path)] if len(path) < n else path for path, n in zip(paths, read, strict=True)])

        engine._lm.keep = too_much  # type: ignore[method-assign]

    model, drafter = small
    assert chi_square(model, ChainProposer(drafter, target_vocab_size=8), 1.0, prepare=spoil) < 1e-3


@pytest.mark.long
def test_control_a_greedy_draft_treated_as_sampled_changes_the_distribution(small, monkeypatch):
    from drafttrain.drafters import chain_draft

    monkeypatch.setattr(chain_draft, "draw_each", lambda probs_NV, generators: probs_NV.argmax(dim=-1).tolist())
    model, drafter = small
    assert chi_square(model, ChainProposer(drafter, target_vocab_size=8), 1.0) < 1e-3


def test_replay_agrees_with_the_loop(target):
    """On decoded text, for several K: the mean difference per prompt is within 4 standard errors."""
    drafter = CausalLMDrafter(noisy(target.model, 0.03))
    prompts = [Prompt(str(i), [1 + i, 2, 3 + i % 7, 5]) for i in range(40)]
    for temperature, lengths in ((0.0, (3, 8)), (1.0, (1, 5))):
        for k in lengths:
            differences, shifted = rounds_of_replay(
                target, drafter, prompts, temperature=temperature, num_draft_tokens=(k, k + 1)
            )
            if temperature == 0:
                assert differences.abs().max() < 1e-9
            else:
                error = standard_error(differences)
                assert differences.mean().abs() < 4 * error
                if k == 1:  # the control: another draft length does not agree
                    assert shifted.mean().abs() > 4 * error


def test_a_token_that_the_target_would_not_write_is_no_accepted_draft(target):
    """On the log of another model, which is also the drafter, the target rejects where its argmax differs."""
    forger = Target(random_llama(seed=9, num_layers=1).double(), byte_tokenizer(), name="forger", fingerprint="")
    prompt = Prompt("0", [1, 2, 3, 5])
    forged = greedy(forger, prompt, 24)
    tokens = torch.tensor([[*prompt.tokens, *forged]])
    would_write = target.model(tokens).logits[0, len(prompt.tokens) - 1 : -1].argmax(dim=-1).tolist()
    rounds, place = 0, 0
    while place < len(forged):
        accepted = 0
        while accepted < 3 and place + accepted < len(forged):
            if forged[place + accepted] != would_write[place + accepted]:
                break
            accepted += 1
        rounds, place = rounds + 1, place + accepted + 1
    (row,) = replay_rows(target, CausalLMDrafter(forger.model), [Text("0", list(prompt.tokens), forged)], Sampling())
    assert expected_rounds(row, 3) == rounds > len(forged) / 2
    (own,) = replay_rows(forger, CausalLMDrafter(forger.model), [Text("0", list(prompt.tokens), forged)], Sampling())
    assert expected_rounds(own, 3) == len(forged) / 4


def test_block_efficiency_is_one_plus_acceptance_by_position(target, proposers):
    counts = [counts_of(g) for g in decode(target, proposers["nearly right"], temperature=1.0, stop_tokens=())]
    totals = totals_of(counts)
    assert totals.block_efficiency == pytest.approx(1 + sum(totals.acceptance_by_position))
    assert totals.num_accepted == sum(totals.accepted_at)


def test_every_forward_is_in_the_ledger(target):
    """Calls and tokens equal those counted by hooks; with one sequence every round is one target call."""
    ledger = Ledger()
    drafter = noisy(target.model, 0.03)
    seen: list[tuple[str, int]] = []
    handles = [
        model.register_forward_pre_hook(
            lambda module, a, k, name=name: seen.append((name, k["input_ids"].shape[1])), with_kwargs=True
        )
        for name, model in (("target", target.model), ("drafter", drafter))
    ]
    proposer = ChainProposer(drafter, target_vocab_size=V, listener=ledger.append)
    (generation,) = decode(target, proposer, prompts=PROMPTS[1:2], temperature=1.0, listener=ledger.append)
    for handle in handles:
        handle.remove()
    found = [(event.model, event.shape.num_tokens) for event in ledger.events]
    # Prompts are read by the trunk without the head, so the hooks do not count them.
    assert [(e.model, e.shape.num_tokens) for e in ledger.rounds()] == seen
    assert found[:2] == [("target", len(PROMPTS[1].tokens) - 1), ("drafter", len(PROMPTS[1].tokens) - 1)]
    assert ledger.calls("target") == len(generation.rounds)
    assert sum(one.num_emitted for one in generation.rounds) == len(generation.tokens)
    assert ledger.calls("drafter") == sum(one.num_draft_tokens for one in generation.rounds)
    weights = sum(p.numel() * p.element_size() for p in target.model.parameters())
    assert all(e.bytes_read > weights * 0.9 for e in ledger.rounds("target"))


def test_records_of_a_batch_have_their_own_streams(target, proposers):
    together = decode(target, proposers["nearly right"], temperature=1.0)
    alone = [decode(target, proposers["nearly right"], prompts=[p], temperature=1.0)[0] for p in PROMPTS]
    assert [g.tokens for g in together] == [g.tokens for g in alone]


def test_lenience_accepts_more(target, proposers):
    def kept(rule: Any) -> int:
        found = decode(target, proposers["nearly right"], temperature=1.0, rule=rule, stop_tokens=())
        return -sum(len(g.rounds) for g in found)

    assert kept(Lenience(LenienceSettings(epsilon=0.05))) > kept(Lossless())
    assert kept(Lenience(LenienceSettings(epsilon=1.0))) == kept(Lossless())


def test_a_drafter_with_a_padded_vocabulary_stays_lossless(target):
    drafter = random_llama(seed=2, num_layers=1, vocab_size=300).double()
    proposer = ChainProposer(drafter, target_vocab_size=V, num_tokens=V)
    found = decode(target, proposer, temperature=0.0, new=16)
    assert [g.tokens for g in found] == [greedy(target, prompt, 16) for prompt in PROMPTS]
    assert all(max(g.tokens) < V for g in decode(target, proposer, temperature=1.0, new=16))


def test_ids_that_no_tokenizer_produces_are_never_emitted_and_have_no_mass_in_replay():
    """The target's head has more rows than its tokenizer has tokens."""
    padded = Target(random_llama(vocab_size=300).double(), byte_tokenizer(), name="padded", fingerprint="")
    drafter = CausalLMDrafter(noisy(padded.model, 0.02))
    assert padded.num_tokens == V
    for proposer in (NoDraft(), drafter.proposer(padded)):
        found = decode(padded, proposer, temperature=1.0, new=60, stop_tokens=())
        assert all(max(g.tokens) < V for g in found)
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]
    (row,) = replay_rows(padded, drafter, texts[:1], Sampling(1.0))
    assert row.acceptance_T.max() <= 1 + 1e-12
    itself = CausalLMDrafter(padded.model)
    assert replay_rows(padded, itself, texts[:1], Sampling(1.0))[0].acceptance_T.min() == pytest.approx(1.0)


def test_replay_of_argmax_drafts_agrees_with_the_loop(target):
    """FIXED at temperature 1: accepted where the text has the drafter's argmax. Replay as sampled drafts gives another number."""
    drafter = CausalLMDrafter(noisy(target.model, 0.03), draft="greedy")
    prompts = [Prompt(str(i), [1 + i, 2, 3 + i % 7, 5]) for i in range(20)]
    policy = FixedLength(FixedLengthSettings(3))
    found = decode(
        target, drafter.proposer(target), prompts=prompts, temperature=1.0, policy=policy, new=32, stop_tokens=()
    )
    texts = [Text(g.id, list(g.prompt_tokens), list(g.tokens)) for g in found]

    def differences() -> float:
        rows = replay_rows(target, drafter, texts, Sampling(1.0))
        return max(abs(len(g.rounds) - expected_rounds(r, 3)) for g, r in zip(found, rows, strict=True))

    assert differences() < 1e-9
    drafter.draft = "sampled"
    assert differences() > 1


def test_mbsu_does_not_depend_on_the_batch_size(target):
    """Without drafts it is 1 for any batch: a round reads the same bytes as a plain call."""
    for together in (1, 3):
        ledger = Ledger()
        prompts = [Prompt(str(i), [1 + i, 2, 3]) for i in range(together)]
        found = decode(target, NoDraft(), prompts=prompts, new=12, stop_tokens=(), listener=ledger.append)
        totals = totals_of([counts_of(g) for g in found])
        value = mbsu(
            num_tokens=totals.num_tokens,
            num_rounds=totals.num_rounds,
            plain_bytes=ledger.plain_bytes(),
            bytes_read=ledger.bytes_read(),
        )
        assert value == pytest.approx(1.0)
