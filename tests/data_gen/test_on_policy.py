"""Answers of the drafter in training: which records, by which weights, from which distribution, and that no file has them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.probability import sampling_probs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.decoding import continued
from drafttrain.data_gen.on_policy import OnPolicyData
from drafttrain.data_gen.settings import OnPolicySettings
from drafttrain.data_gen.training_data import TrainingData, attach_cache
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import random_llama
from tests.data_gen.drawing import LENGTH, drawing, two_sources

BATCH = 8


@pytest.fixture
def data(tmp_path: Path, tiny_target: Target) -> TrainingData:
    """Questions and plain text."""
    return two_sources(tmp_path, tiny_target.tokenizer)


def answers(data: OnPolicyData, step: int = 0) -> dict[int, list[int]]:
    """Return the labels of the drawn records of a step."""
    return {
        number: [t for t, label in zip(one.tokens, one.loss_mask, strict=True) if label]
        for number, one in data.records(step, batch_size=BATCH).items()
    }


def test_answers_depend_on_weights_seed_and_place_and_on_nothing_else(data: TrainingData, tiny_target: Target) -> None:
    first = answers(drawing(data, tiny_target))
    assert first == answers(drawing(data, tiny_target))
    assert first != answers(drawing(data, tiny_target, weights=2))
    assert first != answers(drawing(data, tiny_target, seed=1))
    moved = drawing(data, tiny_target)
    assert answers(moved) == first
    moved.drafter.lm_head.weight.data.mul_(1.5)
    assert moved.records(1, batch_size=BATCH) != drawing(data, tiny_target).records(1, batch_size=BATCH)
    # The same record is drawn in every epoch, each time with other numbers.
    one, two = (drawing(data, tiny_target).records(step, batch_size=84) for step in (0, 1))
    assert {record.id for record in one.values()} == {record.id for record in two.values()}
    assert {tuple(record.tokens) for record in one.values()} != {tuple(record.tokens) for record in two.values()}


def test_a_drawn_record_is_its_prompt_and_new_labels_with_the_version_of_the_weights(
    data: TrainingData, tiny_target: Target
) -> None:
    made = drawing(data, tiny_target, every_steps=2, min_prompt_tokens=3)
    for step, version in ((0, 0), (1, 0), (2, 2), (3, 2)):
        for number, record in made.records(step, batch_size=BATCH).items():
            source, index = data.sampler.at(step * BATCH + number)
            old = data.stores[source][index]
            begins = record.loss_mask.index(True)
            assert record.drawn_by == f"the drafter after {version} steps"
            assert begins == max(3, old.loss_mask.index(True))
            assert record.tokens[:begins] == old.tokens[:begins]
            assert all(record.loss_mask[begins:])
            new = record.tokens[begins:]
            assert 1 <= len(new) <= 8
            assert len(record.tokens) <= LENGTH
            ends = [place for place, token in enumerate(new) if token in tiny_target.eos_token_ids]
            assert ends in ([], [len(new) - 1])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.3, 0.5, 1.0])
def test_the_share_of_each_source_is_exact_at_every_place(
    data: TrainingData, tiny_target: Target, fraction: float
) -> None:
    settings = OnPolicySettings(fraction=fraction)
    read, drawn = Counter[int](), Counter[int]()
    for position in range(400):
        source, count = data.sampler.turn(position)
        assert count == read[source]
        drawn[source] += settings.draws(count)
        read[source] += 1
        assert 0 <= read[source] * fraction - drawn[source] + 1e-9 < 1
    # Three to one for 400 records, and whole periods of tenths and quarters.
    assert read == {0: 300, 1: 100}
    assert drawn == {0: round(300 * fraction), 1: round(100 * fraction)}
    step = drawing(data, tiny_target, fraction=fraction).records(0, batch_size=40)
    assert len(step) == sum(settings.draws(data.sampler.turn(position)[1]) for position in range(40))


def every_batch(made: Any, *, world_size: int, records_per_device: int | None) -> list[DraftBatch]:
    layout = {"batch_size": BATCH, "world_size": world_size, "records_per_device": records_per_device}
    late = [one for rank in range(world_size) for one in made.of_step(1, rank=rank, **layout)]
    return [one if isinstance(one, DraftBatch) else one.made() for one in late]


def rows(batches: list[DraftBatch]) -> Counter[tuple[tuple[int, ...], ...]]:
    """Return the (tokens, labels) of the documents of batches."""
    found: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for batch in batches:
        for number in set(batch.documents_BT[batch.documents_BT >= 0].tolist()):
            own_BT = batch.documents_BT == number
            found[tuple(batch.tokens_BT[own_BT].tolist()), tuple(batch.loss_mask_BT[own_BT].tolist())] += 1
    return found


@pytest.mark.parametrize(("world_size", "records_per_device"), [(1, 3), (2, None), (3, 1), (16, None)])
def test_a_step_is_the_same_in_every_layout(
    data: TrainingData, tiny_target: Target, world_size: int, records_per_device: int | None
) -> None:
    made = drawing(data, tiny_target, fraction=0.5)
    whole = every_batch(made, world_size=1, records_per_device=None)
    parts = every_batch(made, world_size=world_size, records_per_device=records_per_device)
    assert rows(parts) == rows(whole)
    # Every label counts, those of the drawn records and of the others.
    labels = sum(int(batch.loss_mask_BT[batch.positions_BT > 0].sum()) for batch in parts)
    assert {batch.weight_of_step for batch in whole + parts} == {labels}
    drawn = [number for batch in parts for number in batch.drawn_tokens]
    assert (len(drawn), sum(map(bool, drawn))) == (BATCH, len(made.records(1, batch_size=BATCH)))
    fixed = every_batch(data, world_size=1, records_per_device=None)
    assert rows(fixed) != rows(whole), "control: the drawn records differ from those of the data"


def test_without_drawn_records_a_step_is_that_of_the_data(data: TrainingData, tiny_target: Target) -> None:
    (made,) = every_batch(drawing(data, tiny_target, fraction=0.0), world_size=1, records_per_device=None)
    (fixed,) = every_batch(data, world_size=1, records_per_device=None)
    for name in ("tokens_BT", "loss_mask_BT", "positions_BT", "documents_BT"):
        assert torch.equal(getattr(made, name), getattr(fixed, name)), name
    assert (made.weight_of_step, made.record_ids) == (fixed.weight_of_step, fixed.record_ids)


def test_texts_of_one_writer_are_its_own(data: TrainingData, tiny_target: Target) -> None:
    def of_share(share: float, *, weights: int = 1) -> dict[int, list[int]]:
        return answers(drawing(data, tiny_target, drafter_share=share, weights=weights))

    assert of_share(0.0) == of_share(0.0, weights=2), "the target alone wrote them"
    itself = drawing(data, tiny_target, drafter_share=1.0)
    itself.drafter = tiny_target.model
    assert of_share(0.0) == answers(itself), "by the same numbers"
    assert of_share(1.0) != of_share(0.0)
    mixed = of_share(0.5)
    assert mixed not in (of_share(0.0), of_share(1.0))
    # Where all coins fall on one side, both models read every token and one of them writes all.
    prompts, numbers_BT = [[5, 6, 7], [8, 9]], torch.rand(2, 6, dtype=torch.float64)
    both = [CachedLM(model, name="") for model in (random_llama(seed=1, num_layers=1), tiny_target.model)]
    same: Any = {"num_tokens": 257, "ends": {0}, "sampling": Sampling(1.0), "limits": [6, 6], "numbers_BT": numbers_BT}
    for number, writer in enumerate(both):
        coins_BT = torch.full((2, 6), number)
        assert continued(prompts, both, model_BT=coins_BT, **same) == continued(prompts, [writer], **same)


def test_tokens_have_the_distribution_of_the_mixture(data: TrainingData, tiny_target: Target) -> None:
    share, count = 0.3, 4000
    drafter, target = random_llama(seed=1, num_layers=1, vocab_size=6), random_llama(seed=2, num_layers=1, vocab_size=6)
    small = Target(target, tiny_target.tokenizer, name="small", fingerprint="")
    settings = OnPolicySettings(drafter_share=share, max_new_tokens=2)
    made = OnPolicyData(data, settings, drafter=drafter, target=small, num_steps=1, seed=0)
    models = [CachedLM(drafter, name="drafter"), CachedLM(target, name="target")]
    texts = made._continued({number: [1, 2] for number in range(count)}, models)
    drawn = Counter((text[0], text[1] if len(text) > 1 else -1) for text in texts)

    def one(model: Any, prefix: list[int]) -> torch.Tensor:
        return sampling_probs(model(torch.tensor([[1, 2, *prefix]])).logits[0, -1], Sampling(1.0)).double()

    def chi_square(drafter_share: float) -> tuple[float, int]:
        """Return the statistic over all texts of up to two tokens, and its degrees of freedom."""
        chance = {}
        with torch.no_grad():
            first_V = drafter_share * one(drafter, []) + (1 - drafter_share) * one(target, [])
            for token in range(6):
                if token in small.eos_token_ids:
                    chance[token, -1] = float(first_V[token])
                    continue
                next_V = drafter_share * one(drafter, [token]) + (1 - drafter_share) * one(target, [token])
                chance |= {(token, after): float(first_V[token] * next_V[after]) for after in range(6)}
        assert sum(chance.values()) == pytest.approx(1)
        assert drawn.keys() <= chance.keys()
        return sum((drawn[text] - count * p) ** 2 / (count * p) for text, p in chance.items()), len(chance) - 1

    statistic, freedom = chi_square(share)
    # Four standard deviations above the mean of the statistic.
    limit = freedom + 4 * np.sqrt(2 * freedom)
    assert statistic < limit
    for other in (0.0, 0.5, 1.0):
        assert chi_square(other)[0] > limit, "control: another mixture is seen to differ"


def test_ids_of_only_one_of_the_models_are_never_drawn(data: TrainingData, tiny_target: Target) -> None:
    made = drawing(data, tiny_target)
    made.drafter = random_llama(seed=1, num_layers=1, vocab_size=300)
    made.drafter.lm_head.weight.data[257:] = made.drafter.lm_head.weight.data[1] * 3
    assert max(token for text in answers(made).values() for token in text) < 257
    # Control: with these rows they would be drawn.
    lm = CachedLM(made.drafter, name="")
    limits: Any = {"ends": (), "sampling": Sampling(1.0), "limits": [8], "numbers_BT": torch.rand(1, 8).double()}
    assert max(continued([[5, 6]], [lm], num_tokens=300, **limits)[0]) >= 257


def test_no_cache_is_read_or_written_for_a_drawn_record(
    data: TrainingData, tiny_target: Target, tmp_path: Path
) -> None:
    data.settings.cache = "full"
    attach_cache(data, tmp_path / "cache", tiny_target, num_records=3 * BATCH, needs=TargetNeeds())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    made = drawing(data, tiny_target)
    for _ in range(2):
        (drawn,) = every_batch(made, world_size=1, records_per_device=None)
        assert drawn.target is None
        assert drawn.target_rows is None
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (fixed,) = every_batch(data, world_size=1, records_per_device=None)
    assert fixed.target_rows is not None, "control: the records that were not drawn are cached"


def test_answers_of_several_steps_survive_a_checkpoint(data: TrainingData, tiny_target: Target) -> None:
    made = drawing(data, tiny_target, every_steps=4)
    made.records(4, batch_size=BATCH)
    resumed = drawing(data, tiny_target, every_steps=4, weights=2)
    resumed.load_state_dict(made.state_dict())
    assert resumed.records(6, batch_size=BATCH) == made.records(6, batch_size=BATCH)
    with pytest.raises(AssertionError, match="the checkpoint lacks them"):
        drawing(data, tiny_target, every_steps=4).records(6, batch_size=BATCH)


def test_a_drafter_with_dropout_switched_on_draws_nothing(data: TrainingData, tiny_target: Target) -> None:
    made = drawing(data, tiny_target)
    made.drafter.train()
    with pytest.raises(AssertionError, match="dropout"):
        answers(made)
