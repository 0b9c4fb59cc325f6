"""Lexical units: maximal spans over the threshold, look-ahead rows that change no other row, lossless drafts of the tuned target."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.altered_text import packed_alterations
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.proposals import NodeKind, Proposal, RowsBeside, chain
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.lexical_units.module import LexicalUnitDrafter, LexicalUnitsSettings
from drafttrain.drafters.lexical_units.units import NOTHING, LexicalUnits, places_in_units, units_of
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.tuned_target import TuningSettings
from drafttrain.eval.acceptance.confident import Confident, ConfidentSettings
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.length.confidence import Confidence, ConfidenceSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.cached_lm import CachedLM
from tests.drafters.test_medusa import V, texts_of
from tests.eval.decoding import chi_square, decode, greedy, small_target

AHEAD, TOKEN = 3, 5
LORA = LoraSettings(rank=8, alpha=16.0, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
CHAIN = FixedLength(FixedLengthSettings(AHEAD))
PROMPTS = [Prompt(str(i), [3 + 7 * i, 11, 2 + i]) for i in range(6)]


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))


def units(threshold: float = 0.02) -> LexicalUnits:
    return LexicalUnits(threshold, AHEAD, TOKEN)


@pytest.fixture(scope="module")
def records(target: Target) -> list[Record]:
    texts = texts_of(target, 8, seed=2, new=20)
    return [
        Record(text.id, [*text.prompt, *text.new[: 20 - i]], [False] * 4 + [True] * (20 - i))
        for i, text in enumerate(texts)
    ]


def create(target: Target, **settings: Any) -> LexicalUnitDrafter:
    chosen = {"look_ahead_token_id": TOKEN, "ahead": AHEAD, "tune": TuningSettings(lora=LORA)} | settings
    made = LexicalUnitsSettings(**chosen)
    return LexicalUnitDrafter.create(made, target=target, tokenizer=target.tokenizer).to(target.model.dtype)


def batch_of(records: list[Record], noted: list[Any], *, step: int = 0) -> DraftBatch:
    altered = [units().altered(record, noted[i], seed=1000 * step + i) for i, record in enumerate(records)]
    labels = [sum(record.loss_mask) for record in records]
    batch, at = pack(records, width=60, weight_of_step=float(sum(labels)))
    return replace(batch, altered=packed_alterations(batch.tokens_BT, at, altered, labels))


@pytest.fixture(scope="module")
def trained(target: Target, records: list[Record]) -> LexicalUnitDrafter:
    torch.manual_seed(0)
    drafter, noted = create(target), units().of(records, target, seed=0)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for step in range(60):
        batch = batch_of(records, noted, step=step)
        optimizer.zero_grad()
        (batch_loss(drafter, CrossEntropy(), batch, vocab_size=V).total / batch.weight_of_step).backward()
        optimizer.step()
    return drafter.eval()


def test_units_are_maximal_disjoint_and_over_the_threshold():
    """Random masks and thresholds: units hold every label once, and no unit could be longer."""
    draws = random.Random(0)
    several = 0
    for _ in range(300):
        size = draws.randrange(1, 24)
        mask = [draws.random() < 0.8 for _ in range(size)]
        sure = [draws.random() < 0.5 for _ in range(size)]
        found = units_of(places_in_units(mask, sure))
        labels = [place for place, label in enumerate(mask) if label and place > 0]
        assert [place for unit in found for place in unit] == labels
        starts = {unit.start for unit in found}
        for unit in found:
            assert all(sure[place] for place in unit[1:])
            assert unit.stop not in labels or not sure[unit.stop]
            assert unit.start - 1 not in labels or not sure[unit.start]
            several += len(unit) > 1
        assert len(starts) == len(found)
    assert several > 100


def test_the_threshold_is_the_targets_probability_of_the_text(target: Target, records: list[Record]):
    """Computed plainly, text by text; texts of different lengths are read together."""
    for record, notes_TC in zip(records, units().of(records, target, seed=0), strict=True):
        tokens = torch.tensor([list(record.tokens)])
        probs_TV = target.model(tokens).logits[0].softmax(-1)
        sure = [False, *(float(probs_TV[i, token]) >= 0.02 for i, token in enumerate(record.tokens[1:]))]
        assert notes_TC[:, 0].tolist() == places_in_units(record.loss_mask, sure)
        assert notes_TC[:4, 0].tolist() == [NOTHING] * 4
    assert "at least two" in units().summary(records, units().of(records, target, seed=0))
    with pytest.raises(DataError, match="no unit has two tokens"):
        units(1.0).summary(records, units(1.0).of(records, target, seed=0))


def test_a_text_has_look_ahead_tokens_in_one_unit_and_predicts_its_labels(target: Target, records: list[Record]):
    notes_TC = units().of(records, target, seed=0)[0]
    several = [unit for unit in units_of(notes_TC[:, 0].tolist()) if len(unit) > 1]
    seen = set()
    for seed in range(60):
        one = units().altered(records[0], notes_TC, seed=seed)
        assert list(one.text) == list(records[0].tokens)
        (unit,) = [unit for unit in several if unit.start == one.places[0]]
        assert list(one.places) == list(unit[: AHEAD + 1])[:-1]
        assert [one.read[place] for place in one.places] == [TOKEN] * len(one.places)
        rest = set(range(len(one.text))) - set(one.places)
        assert all(one.read[place] == one.text[place] for place in rest)
        seen.add(unit.start)
    assert len(seen) == len(several)


def test_the_loss_is_the_cross_entropy_of_the_unit_after_its_first_token(
    target: Target, trained: LexicalUnitDrafter, records: list[Record]
):
    noted = units().of(records, target, seed=0)
    batch = batch_of(records[:3], noted[:3], step=7)
    trained.train()
    found = trained(batch).extra_loss
    trained.eval()
    wanted = 0.0
    assert trained.tuned is not None
    with torch.no_grad(), trained.tuned.applied():
        for i, record in enumerate(records[:3]):
            one = units().altered(record, noted[i], seed=7000 + i)
            # The text up to the unit's first token, which is not read, and look-ahead tokens.
            read = [*record.tokens[: one.places[0]], *[TOKEN] * len(one.places)]
            q_TV = target.model(torch.tensor([read])).logits[0].log_softmax(-1)
            losses = [-float(q_TV[place, record.tokens[place + 1]]) for place in one.places]
            wanted += sum(losses) / len(losses) * sum(record.loss_mask)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


def test_rows_beside_the_nodes_change_no_logits_of_the_nodes(target: Target):
    """Of one call over several sequences; and those rows are what a text that ends in look-ahead tokens gives."""
    texts = [[3, 9, 4, 8], [7, 2]]
    nodes = [[11, 12], [13]]
    lm = CachedLM(target.model, name="target")

    def read(beside: bool) -> list[Any]:
        lm.begin(texts)
        proposals: list[Proposal] = []
        for own in nodes:
            plain = chain(own, kind=NodeKind.FIXED)
            count = len(own)
            parents = [
                parent
                for node in range(count)
                for parent in (node, *range(count + node * AHEAD, count + (node + 1) * AHEAD - 1))
            ]
            rows = RowsBeside([TOKEN] * len(parents), parents)
            proposals.append(replace(plain, beside=rows) if beside else plain)
        read_nodes, trees = zip(*(one.read() for one in proposals), strict=True)
        return lm.forward(read_nodes, parents=trees, needs=TargetNeeds(logits=True))

    for text, own, alone, both in zip(texts, nodes, read(False), read(True), strict=True):
        assert alone.logits_BTV is not None
        assert both.logits_BTV is not None
        count = len(own)
        torch.testing.assert_close(both.logits_BTV[:, :count], alone.logits_BTV, rtol=0, atol=1e-10)
        for node in range(count):
            tokens = [*text, *own[: node + 1], *[TOKEN] * AHEAD]
            wanted = target.model(torch.tensor([tokens])).logits[0, -AHEAD:]
            begin = count + node * AHEAD
            torch.testing.assert_close(both.logits_BTV[0, begin : begin + AHEAD], wanted, rtol=0, atol=1e-10)


def test_drafts_are_the_targets_own_predictions_at_look_ahead_tokens(target: Target, trained: LexicalUnitDrafter):
    """The draft of every round, computed plainly from the text without its newest token."""
    assert trained.tuned is not None
    with torch.no_grad(), trained.tuned.applied():
        proposer, seen = trained.proposer(target), 0
        propose = proposer.propose

        def checked(*given: Any) -> list[Proposal]:
            nonlocal seen
            made = propose(*given)
            for context, one in zip(proposer._contexts, made, strict=True):  # type: ignore[attr-defined]
                if drafted := one.tokens_N[1:].tolist():
                    read = torch.tensor([[*context.tokens[:-1], *[TOKEN] * AHEAD]])
                    logits_KV = target.model(read).logits[0, -AHEAD:]
                    assert drafted == logits_KV.argmax(-1)[: len(drafted)].tolist()
                    chances = logits_KV.softmax(-1).max(-1).values[: len(drafted)].tolist()
                    assert one.confidence == pytest.approx(chances, rel=1e-5)
                    seen += 1
            return made

        proposer.propose = checked  # type: ignore[method-assign]
        decode(target, proposer, prompts=PROMPTS, policy=CHAIN, new=12, stop_tokens=())
        assert seen > 10


def test_it_is_exact_for_the_tuned_target_in_fewer_rounds_than_tokens(
    target: Target, trained: LexicalUnitDrafter, tmp_path: Path
):
    trained.save(tmp_path)
    again = LexicalUnitDrafter.load(tmp_path, target)
    tuned = again.adapted(target)
    assert tuned.name != target.name

    def rounds(one: Target) -> int:
        found = decode(one, again.proposer(one), prompts=PROMPTS, policy=CHAIN, new=24, stop_tokens=())
        assert [each.tokens for each in found] == [greedy(one, prompt, 24) for prompt in PROMPTS]
        return sum(len(each.rounds) for each in found)

    assert rounds(tuned) < 0.95 * rounds(target)


@pytest.mark.parametrize("draft", ["sampled", "greedy"])
def test_sampled_output_has_the_targets_distribution(draft: str):
    small = small_target()
    drafter = create(small, draft=draft)
    assert chi_square(small.model, drafter.proposer(small), temperature=1.0, samples=800) > 1e-3


@pytest.mark.parametrize("draft", ["sampled", "greedy"])
def test_a_saved_drafter_drafts_as_its_recipe_says(target: Target, tmp_path: Path, draft: str):
    create(target, draft=draft).save(tmp_path)
    assert LexicalUnitDrafter.load(tmp_path, target).draft == draft


def test_a_threshold_above_one_is_plain_decoding(target: Target, trained: LexicalUnitDrafter):
    assert trained.tuned is not None
    with trained.tuned.applied():

        def outputs(rule: Any, policy: Any = CHAIN) -> list[Any]:
            proposer = trained.proposer(target)
            return decode(target, proposer, prompts=PROMPTS, policy=policy, rule=rule, new=24, stop_tokens=())

        exact = outputs(Lossless())
        plain = [greedy(target, prompt, 24) for prompt in PROMPTS]
        assert [one.tokens for one in exact] == plain
        above = outputs(Confident(ConfidentSettings(1.01)))
        assert [(one.tokens, one.rounds) for one in above] == [(one.tokens, one.rounds) for one in exact]
        # A draft of tokens above probability 1 is no draft.
        undrafted = outputs(Lossless(), Confidence(ConfidenceSettings(threshold=1.0, min_tokens=0, max_tokens=AHEAD)))
        assert all(part.num_draft_tokens == 0 for one in undrafted for part in one.rounds)
        # Control: where every token is trusted, none is verified, and the output differs.
        trusted = outputs(Confident(ConfidentSettings(0.0)))
        assert [one.tokens for one in trusted] != plain
        assert all(part.num_accepted == part.num_draft_tokens for one in trusted for part in one.rounds)


def test_damaged_files_and_ids_outside_of_the_vocabulary_are_refused(target: Target, tmp_path: Path):
    with pytest.raises(CheckpointError, match=rf"drafter\.look_ahead_token_id: must be in 0\.\.{V - 1}"):
        create(target, look_ahead_token_id=V)
    (tmp_path / "config.json").write_text('{"ahead": 0, "look_ahead_token_id": 1}')
    with pytest.raises(CheckpointError, match="ahead must be a number of at least 1"):
        LexicalUnitDrafter.load(tmp_path, target)
    (tmp_path / "config.json").write_text('{"ahead": 2, "look_ahead_token_id": 1, "draft": "beam"}')
    with pytest.raises(CheckpointError, match=r"config\.json: draft must be sampled or greedy, got 'beam'"):
        LexicalUnitDrafter.load(tmp_path, target)
