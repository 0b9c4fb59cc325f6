"""A cache in eight bits: its bytes, what it costs of acceptance, and a training that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.eight_bit import as_states, codes_and_steps, from_eight_bits, in_eight_bits, stored_width
from drafttrain.core.probability import acceptance_rate
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.stored.cache_writer import build_cache
from drafttrain.data_gen.stored.head_rounding import rounded_for_head
from drafttrain.data_gen.stored.stored_states import Cost
from drafttrain.data_gen.stored.validation_target import _Texts, cached_target
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits
from tests.conftest import byte_tokenizer, random_llama
from tests.data_gen.test_cached_states import NEEDS, cached, curve, files

TEXTS = [list(range(3, 60)), list(range(90, 20, -1))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and then it sleeps; " * 30)
    return path


@pytest.fixture(scope="module")
def sharp() -> Target:
    """Return a target whose distribution has a few likely tokens, as trained ones have."""
    torch.manual_seed(0)
    model = random_llama(hidden_size=192)
    model.get_output_embeddings().weight.data *= 12
    return Target(model, byte_tokenizer(), name="t", fingerprint="")


def final_states(target: Target) -> Tensor:
    """Return final_ND of the texts."""
    seen = [target.read(torch.tensor([one]), torch.arange(len(one))[None], TargetNeeds(final=True)) for one in TEXTS]
    return torch.cat([one.final_BTD[0] for one in seen if one.final_BTD is not None])


def probs(target: Target, states_ND: Tensor) -> Tensor:
    with torch.no_grad():
        return head_logits(target.model, states_ND)[:, : target.num_tokens].double().softmax(dim=-1)


def test_hidden_states_are_the_rounded_ones_of_the_live_target(text: Path, tiny_target: Target) -> None:
    data = cached(text, tiny_target, NEEDS, cache="states", cache_dtype="int8")
    (batch,) = data.of_step(0, batch_size=8)
    assert batch.target is not None
    live = tiny_target.read(batch.tokens_BT, batch.positions_BT, NEEDS)
    real_BT = batch.documents_BT >= 0
    assert batch.target.hidden_BTD[1].dtype == torch.int8
    restored = batch.restored().target
    assert restored is not None
    for index in NEEDS.hidden:
        wanted_BTD = from_eight_bits(in_eight_bits(live.hidden_BTD[index]))
        error = (restored.hidden_BTD[index] - wanted_BTD)[real_BT].norm() / wanted_BTD[real_BT].norm()
        assert error < 1e-3  # a few features are rounded the other way: the live states have other batch shapes
        assert not restored.hidden_BTD[index][~real_BT].any()


def test_its_cost_is_printed_and_stored_and_its_bytes_were_announced(
    text: Path,
    tiny_target: Target,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = cached(text, tiny_target, NEEDS, cache="states", cache_dtype="int8")
    cache = data.caches[0]
    assert cache is not None
    size = sum(array.nbytes for array in files(text).values())
    row = 3 * stored_width(32)
    assert cache.wanted.bytes_a_row(tiny_target) == row
    assert size == cache.layout.num_rows * row
    on_disk = sum(path.stat().st_size for path in (text.parent / "d" / "0-cache").glob("*.npy"))
    assert 0 < on_disk - size == 128 * 3 * len(cache.files), "the headers of the files"
    cost = json.loads((text.parent / "d" / "0-cache" / "cache.json").read_text())["cost"]
    assert cost["tokens"] > 0
    assert 0 < cost["total"] / cost["tokens"] < 0.02
    assert f"costs at most {Cost(**cost)}" in " ".join(capfd.readouterr().err.split())
    exact = cached(text, tiny_target, NEEDS, folder="e", cache="states")
    assert exact.caches[0] is not None
    assert json.loads((text.parent / "e" / "0-cache" / "cache.json").read_text())["cost"]["worst"] == 0
    assert "costs at most" not in capfd.readouterr().err


def test_no_drafter_can_lose_more_than_the_cost(sharp: Target) -> None:
    final_ND = final_states(sharp)
    stored_NS = in_eight_bits(final_ND)
    p_NV, stored_p_NV = probs(sharp, final_ND), probs(sharp, from_eight_bits(stored_NS))
    cost_N = 1 - acceptance_rate(p_NV, stored_p_NV)
    measured = Cost.measured(final_ND, stored_NS, sharp)
    assert measured.worst <= float(cost_N.max()) + 1e-9
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.3, 3.0, 30.0):
        q_NV = (sharpness * torch.randn(p_NV.shape, generator=generator, dtype=torch.float64)).softmax(dim=-1)
        change_N = (acceptance_rate(p_NV, q_NV) - acceptance_rate(stored_p_NV, q_NV)).abs()
        assert (change_N <= cost_N + 1e-12).all()
    # Control: nothing smaller bounds it. A perfect drafter loses all of it.
    torch.testing.assert_close(acceptance_rate(p_NV, p_NV) - acceptance_rate(stored_p_NV, p_NV), cost_N)


def test_rounding_for_the_head_costs_less_than_rounding_to_the_nearest(sharp: Target) -> None:
    final_ND = final_states(sharp)
    nearest_NS, chosen_NS = (
        in_eight_bits(final_ND),
        rounded_for_head(final_ND, sharp.model, num_tokens=sharp.num_tokens),
    )
    p_NV = probs(sharp, final_ND)
    nearest, chosen = (
        1 - float(acceptance_rate(p_NV, probs(sharp, from_eight_bits(one))).mean()) for one in (nearest_NS, chosen_NS)
    )
    assert chosen < 0.6 * nearest
    codes_ND, steps_ND = codes_and_steps(chosen_NS)
    assert torch.equal(steps_ND, codes_and_steps(nearest_NS)[1])
    off_ND = (codes_ND - final_ND / steps_ND).abs()
    assert float(off_ND.max()) <= 1.25
    # Control: the other integer, taken at random as often, costs more, not less.
    flipped_ND = codes_ND != codes_and_steps(nearest_NS)[0]
    sign_ND = torch.where(torch.rand(codes_ND.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    random_ND = (codes_and_steps(nearest_NS)[0] + sign_ND * flipped_ND) * steps_ND
    assert 1 - float(acceptance_rate(p_NV, probs(sharp, random_ND)).mean()) > nearest


def test_a_training_reads_it(text: Path, tiny_target: Target) -> None:
    live, _ = curve(text, tiny_target, cache="none")
    stored, runs = curve(text, tiny_target, cache="states", cache_dtype="int8")
    assert runs == 0
    assert stored == pytest.approx(live, abs=0.02)
    assert stored != pytest.approx(live, abs=1e-6)


def test_validation_reads_it(tiny_target: Target, tmp_path: Path) -> None:
    stored = cached_target(tmp_path, TEXTS, tiny_target, needs=NEEDS, dtype="int8", max_gb=1)
    tokens_BT, positions_BT = torch.tensor([TEXTS[1]]), torch.arange(len(TEXTS[1]))[None]
    seen, live = (one.read(tokens_BT, positions_BT, NEEDS) for one in (stored, tiny_target))
    for ours, theirs in ((seen.final_BTD, live.final_BTD), (seen.hidden_BTD[1], live.hidden_BTD[1])):
        assert ours is not None
        assert theirs is not None
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02


def test_the_distribution_of_a_batch_is_that_of_its_stored_states(tiny_target: Target, tmp_path: Path) -> None:
    wanted = Wanted("states", TargetNeeds(), 0, "int8")
    cache = build_cache(tmp_path, _Texts(TEXTS), [0, 1], tiny_target, wanted=wanted, max_gb=1)
    stored: dict[str, Any] = cache.stored(0, 20)
    batch = cache.with_arrays(cache_batch(20), {name: tensor[None] for name, tensor in stored.items()})
    assert batch.target_rows is not None
    logits_NV = batch.target_rows.at(torch.arange(20))
    torch.testing.assert_close(logits_NV, head_logits(tiny_target.model, as_states(stored["final"])))


def cache_batch(length: int) -> Any:
    return pack([Record("a", TEXTS[0][:length], [True] * length)], width=length, weight_of_step=1.0)[0]
