"""The order of training: a pure function of (seed, position), exact mixtures, weights that do not depend on the layout."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from drafttrain.core.texts import Record
from drafttrain.data_gen.contamination import contaminated
from drafttrain.data_gen.packing import pack, plan, row_length
from drafttrain.data_gen.sampler import Sampler, _interleaved
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings


def test_nine_to_one_is_counted_in_every_ten():
    sampler = Sampler([100, 30], [9, 1], seed=0)
    for start in range(0, 500, 10):
        assert Counter(sampler.at(n)[0] for n in range(start, start + 10)) == {0: 9, 1: 1}


@pytest.mark.parametrize(
    "weights",
    [
        [1234, 4321, 6789, 12345],
        [0.1234, 0.2345, 0.3456, 0.2965],
        [0.7, 0.1, 0.1, 0.1],
        [1 / 3, 0.14159265, 0.271828, 0.17],
        [1e300, 3e299],
        [1e-300, 2e-300, 4e-300],
        [5],
    ],
)
def test_a_source_is_always_less_than_one_record_from_its_share(weights):
    """From the first record on, for any weights; and a position far away costs no more than the first."""
    num_records = 4000
    sampler = Sampler([10] * len(weights), weights, seed=0)
    drawn_N = np.array([sampler.at(n)[0] for n in range(num_records)])
    scale = max(weights)
    shares = [weight / scale / sum(other / scale for other in weights) for weight in weights]
    for source, share in enumerate(shares):
        behind_N = np.cumsum(drawn_N == source) - share * np.arange(1, num_records + 1)
        assert np.abs(behind_N).max() < 1
        # A share that no window can divide is carried over: exact in the long run, too.
        before_S, *_ = sampler._window(10**12 // sampler._length)
        assert abs(before_S[source] - share * (10**12 // sampler._length * sampler._length)) < 2
    assert len({sampler.at(10**12 + n) for n in range(20 * len(weights))}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_any_window_of_integer_shares_is_as_even_as_possible(seed):
    """Tijdeman's bound, which is tight: 1 - 1 / (2 S - 2) for S sources."""
    rng = random.Random(seed)
    for _ in range(10):
        counts = tuple(rng.randrange(1, rng.choice([3, 60, 300])) for _ in range(rng.randrange(2, 7)))
        source_P, nth_P = _interleaved(counts)
        place_P = np.arange(1, sum(counts) + 1)
        for source, count in enumerate(counts):
            behind_P = np.cumsum(source_P == source) - count / sum(counts) * place_P
            assert np.abs(behind_P).max() <= 1 - 1 / (2 * len(counts) - 2) + 1e-9
            assert nth_P[source_P == source].tolist() == list(range(count))


def test_a_share_that_no_window_can_hold_is_read_in_the_long_run():
    sampler = Sampler([10, 10], [1, 1e-6], seed=0)
    rest = [sampler._window(number)[0][1] for number in range(400)]
    assert rest == sorted(rest)
    assert rest[-1] == round(399 * sampler._length * 1e-6 / (1 + 1e-6))


def test_nine_to_one_keeps_its_order():
    """Runs started before mixtures had windows continue with the same records."""
    sampler = Sampler([100, 30], [9, 1], seed=0)
    assert [sampler.at(n)[0] for n in range(20)] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0] * 2


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.25, 0.25], [3, 2], [0.7, 0.3]])
def test_every_epoch_of_a_source_reads_each_record_once(weights):
    sizes = [7, 5, 3][: len(weights)]
    sampler = Sampler(sizes, weights, seed=1)
    seen: dict[int, list[int]] = {}
    for n in range(400):
        source, record = sampler.at(n)
        seen.setdefault(source, []).append(record)
    for source, records in seen.items():
        size = sizes[source]
        epochs = [records[i : i + size] for i in range(0, len(records) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(epochs) < 2 or any(epoch != epochs[0] for epoch in epochs)


def test_the_order_needs_no_history():
    fresh = [Sampler([50, 20], [2, 1], seed=3).at(n) for n in (400, 3, 77)]
    one = Sampler([50, 20], [2, 1], seed=3)
    assert [one.at(n) for n in (400, 3, 77)] == fresh
    assert [Sampler([50, 20], [2, 1], seed=4).at(n) for n in range(30)] != [one.at(n) for n in range(30)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 0.0004], {0: 2500, 1: 1}), ([0.0003, 0.0001, 0], {0: 3, 1: 1}), ([1e-9, 2e-9], {0: 1, 1: 2})],
)
def test_a_small_weight_is_not_rounded_away(weights, counts):
    sampler = Sampler([10] * len(weights), weights, seed=0)
    assert Counter(sampler.at(n)[0] for n in range(sum(counts.values()))) == counts


def test_a_weight_too_small_to_be_counted_is_refused():
    def problems(*weights: float) -> list[str]:
        return DataSettings(sources=[TextSettings(path="x", weight=weight) for weight in weights]).check()

    assert problems(1, 1e-9) == ["sources: weights 1e-09 and 1: the ratio must be at most 1 to 10,000, or a weight 0"]
    assert problems(1, 1e-4, 0) == []
    assert problems(0, 0) == ["sources: at least one weight must be above 0"]


def test_a_source_without_weight_is_never_read():
    sampler = Sampler([5, 5], [1, 0], seed=0)
    assert {sampler.at(n)[0] for n in range(50)} == {0}


def test_packing_keeps_every_token_and_starts_every_document_at_zero():
    records = [Record(str(i), list(range(1, n + 1)), [True] * n) for i, n in enumerate((5, 9, 2, 4, 8))]
    batch, places = pack(records, width=10, weight_of_step=1.0)
    for record, (row, column) in zip(records, places, strict=True):
        span = slice(column, column + len(record.tokens))
        assert batch.tokens_BT[row, span].tolist() == record.tokens
        assert batch.positions_BT[row, span].tolist() == list(range(len(record.tokens)))
        assert batch.documents_BT[row, span].unique().tolist() == [int(record.id)]
    assert int((batch.documents_BT >= 0).sum()) == 28
    assert batch.tokens_BT.shape[0] == 3
    assert sorted(i for row in plan([5, 9, 2, 4, 8], width=10) for i in row) == list(range(5))


@pytest.mark.parametrize(("multiple", "slots"), [(1, 13), (8, 16), (13, 13), (64, 20)])
def test_rows_padded_to_a_multiple_are_no_wider_than_they_may_be_and_hold_the_same(multiple, slots):
    records = [Record(str(n), range(n, n + size), [True] * size) for n, size in enumerate((13, 9))]
    plain, plain_places = pack(records, width=20, weight_of_step=1.0)
    padded, places = pack(records, width=20, multiple=multiple, weight_of_step=1.0)
    assert padded.tokens_BT.shape == (2, slots)
    assert places == plain_places
    assert (padded.documents_BT[:, 13:] == -1).all()
    assert torch.equal(padded.documents_BT[:, :13], plain.documents_BT)
    assert torch.equal(padded.tokens_BT[:, :13], plain.tokens_BT)
    # Padding is one separate document.
    assert padded.positions_BT[1, 9:].tolist() == list(range(slots - 9))
    # A record longer than a row is not cut.
    assert pack(records[:1], width=8, multiple=64, weight_of_step=1.0)[0].tokens_BT.shape == (1, 13)


def test_packed_rows_equal_rows_alone(tiny_target):
    """The target's outputs on a packed document equal those on it alone: attention does not cross documents."""
    from drafttrain.core.target_rows import TargetNeeds

    generator = torch.Generator().manual_seed(0)
    records = [
        Record(str(i), torch.randint(1, 250, (n,), generator=generator).tolist(), [True] * n)
        for i, n in enumerate((6, 9, 4))
    ]
    batch, places = pack(records, width=20, weight_of_step=1.0)
    whole = tiny_target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(logits=True)).logits_BTV
    for record, (row, column) in zip(records, places, strict=True):
        alone = tiny_target.model(torch.tensor([record.tokens])).logits[0]
        torch.testing.assert_close(whole[row, column : column + len(record.tokens)], alone, rtol=1e-4, atol=2e-5)


def test_a_prompt_that_shares_thirteen_tokens_is_found_and_one_that_shares_twelve_is_not():
    generator = np.random.default_rng(0)
    text = generator.integers(0, 500, 1000).astype(np.uint32)
    prompts = {
        "inside": [*text[100:113].tolist(), 1, 2],
        "almost": [*text[100:112].tolist(), 501, 502],
        "elsewhere": generator.integers(0, 500, 40).tolist(),
        "across": text[495:510].tolist(),
    }
    assert contaminated(prompts, [text[:500], text[500:]], ngram=13) == ["inside"]
    assert contaminated(prompts, [text], ngram=13) == ["inside", "across"]
    assert contaminated(prompts, [text], ngram=0) == []
    assert contaminated({"shorter": [1, 2, 3]}, [text], ngram=13) == []


def slots_of(lengths: list[int], rows: list[list[int]]) -> int:
    return len(rows) * row_length(lengths, rows, width=10**6)


def test_no_row_is_longer_than_it_need_be_for_the_number_of_rows():
    """First fit alone leaves the last row almost empty, and pads it to the length of the first."""
    rng = random.Random(0)
    for _ in range(200):
        width = rng.randrange(20, 200)
        lengths = [rng.randrange(1, width + 1) for _ in range(rng.randrange(1, 24))]
        rows = plan(lengths, width=width)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        assert all(sum(lengths[number] for number in row) <= width for row in rows)
        assert slots_of(lengths, rows) <= slots_of(lengths, first_fit(lengths, width=width))
    alike = [60] * 8
    assert slots_of(alike, first_fit(alike, width=420)) == 840
    assert slots_of(alike, plan(alike, width=420)) == 480
    assert [len(row) for row in plan([30, 5, 40], width=20)] == [1, 1, 1], "a longer record has a row of its own"


def first_fit(lengths: list[int], *, width: int) -> list[list[int]]:
    """Return rows filled one after the other."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [row for row in rows if sum(lengths[i] for i in row) + lengths[number] <= width]
        if room:
            room[0].append(number)
        else:
            rows.append([number])
    return rows
