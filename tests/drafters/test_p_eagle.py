"""P-EAGLE: the network equals its definition; what a slot may and may not read; the steps that a training step keeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.piece_size import PieceSize
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.drafters.p_eagle.module import PEagleDrafter
from drafttrain.drafters.p_eagle.settings import PEagleSettings
from drafttrain.losses import losses
from drafttrain.losses.align import chosen_rows
from drafttrain.losses.step import BatchLoss, batch_loss, with_plan
from tests.drafters.eagle_models import eagle_drafter, eagle_target, packed
from tests.drafters.p_eagle_models import MASK, SETTINGS, p_eagle, plain_logits

LENGTHS = (9, 7, 12)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 1, "draft_vocab_size": 200},
    {"num_layers": 3, "fc_norm": True, "norm_before_residual": True},
]
TEXTS = [list(range(3, 33)), list(range(30, 35)), list(range(40, 64))]
MASKS = [[5 <= i < 9 or i >= 12 for i in range(30)], [False] * 5, [6 <= i < 20 for i in range(24)]]
"""Two answers, none, one that ends before a question."""


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def logits_of(drafter: Any, batch: Any) -> torch.Tensor:
    """Return logits_BTKR at every slot."""
    with torch.no_grad():
        drafted = drafter(batch)
        return torch.stack([drafted.logits_BTV(depth) for depth in sorted(drafted.states_BTD)], dim=2)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("width", [12, 22])  # one document a row, padded; two documents in a row
def test_every_row_and_depth_of_packed_texts_is_one_pass_alone(target, settings, width):
    drafter = p_eagle(target, **settings)
    batch, places = packed(target, drafter, LENGTHS, width=width)
    ours = logits_of(drafter, batch)
    for (row, column), length in zip(places, LENGTHS, strict=True):
        tokens = batch.tokens_BT[row, column : column + length].tolist()
        for slot in (0, length - 2):
            plain = plain_logits(drafter, target, tokens, slot)
            torch.testing.assert_close(ours[row, column + slot], plain, rtol=0, atol=1e-12)


def test_control_mask_slots_at_the_position_of_their_row_break_the_identity(target):
    drafter = p_eagle(target)
    batch, _ = packed(target, drafter, LENGTHS[:1], width=9)
    wrong = plain_logits(drafter, target, batch.tokens_BT[0].tolist(), 5, shift=0)
    distance_K = (logits_of(drafter, batch)[0, 5] - wrong).abs().amax(dim=-1).detach()
    assert float(distance_K[0]) < 1e-12
    assert float(distance_K[1:].min()) > 1e-2


def test_with_one_layer_and_one_depth_it_is_the_first_step_of_eagle3(target):
    """Bit for bit, logits and loss; the control is another layer."""
    common = {"taps": [0, 1, 3], "num_heads": 4, "num_kv_heads": 2, "draft_vocab_size": 200}
    eagle3 = eagle_drafter("eagle3", target, num_steps=1, **common)
    batch, _ = packed(target, eagle3, LENGTHS, width=22)
    seen = target.read(batch.tokens_BT, batch.positions_BT, eagle3.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    for num_layers in (1, 2):
        drafter = p_eagle(target, num_layers=num_layers, num_depths=1, **common)
        drafter.load_state_dict(eagle3.state_dict(), strict=False)
        assert torch.equal(logits_of(drafter, batch), logits_of(eagle3, batch)) == (num_layers == 1)
        same = torch.equal(loss_of(drafter, batch).loss_N, loss_of(eagle3, batch).loss_N)
        assert same == (num_layers == 1)


def test_a_depth_does_not_depend_on_how_many_there_are(target):
    drafter = p_eagle(target)
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    whole = logits_of(drafter, batch)
    for depths in (1, 2, 3):
        part = logits_of(drafter, replace(batch, num_depths=depths))
        assert part.shape[2] == depths
        torch.testing.assert_close(part, whole[:, :, :depths], rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["token", "feature"])
def test_a_row_reads_features_up_to_itself_and_one_token_more(target, what):
    drafter, row = p_eagle(target), 5
    batch, _ = packed(target, drafter, (12,), width=12)
    assert batch.target is not None
    whole = logits_of(drafter, batch)[0]

    def change(place: int) -> torch.Tensor:
        if what == "token":
            tokens = batch.tokens_BT.clone()
            tokens[0, place] = (tokens[0, place] + 7) % 250
            return logits_of(drafter, replace(batch, tokens_BT=tokens))[0]
        hidden = {tap: states.clone() for tap, states in batch.target.hidden_BTD.items()}
        for states in hidden.values():
            states[0, place] += 1
        return logits_of(drafter, replace(batch, target=TargetOutput(hidden_BTD=hidden)))[0]

    moved = [(change(place)[row] - whole[row]).abs().amax(dim=-1) for place in range(12)]
    reads = set(range(1, row + 2)) if what == "token" else set(range(row + 1))
    for depth in range(drafter.num_depths):
        assert {place for place, distance_K in enumerate(moved) if distance_K[depth]} == reads


def batch_of(target: Any, drafter: Any, chosen: list[int], *, width: int = 36, step: int = 0) -> Any:
    """Return some of the texts, packed and read by the target."""
    records = [Record(str(i), TEXTS[i], MASKS[i]) for i in chosen]
    batch, _ = pack(records, width=width, first_document=chosen[0], weight_of_step=1.0, step=step)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    return replace(batch, target=seen, target_rows=target.rows_of(seen))


def loss_of(drafter: Any, batch: Any, kind: str = "forward_kl") -> BatchLoss:
    return batch_loss(drafter, losses.build(losses.entry(kind).settings()), batch, vocab_size=257)


def gradients(drafter: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {name: weight for name, weight in drafter.named_parameters() if weight.requires_grad}
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


@pytest.mark.parametrize("plan", [False, True])
def test_training_computes_the_kept_slots_only(target, plan, monkeypatch):
    """Their states are those of a forward over all slots, in several pieces of attention."""
    monkeypatch.setattr("drafttrain.drafters.dflash.attention.SCORES", PieceSize(500, 500))
    drafter = p_eagle(target)
    batch = batch_of(target, drafter, [0, 1, 2])
    with torch.no_grad():
        whole = drafter.eval()(batch)
    drafter.train()
    batch = with_plan(drafter, losses.build(losses.entry("ce").settings()), batch) if plan else batch
    computed: list[int] = []
    drafter.layers["1"].mlp.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
    drafted = drafter(batch)
    kept = {depth: rows_n for depth, (rows_n, _) in chosen_rows(batch, drafter.rows_asked()[0]).items()}
    slots = sum(len(rows_n) for depth, rows_n in kept.items() if depth > 1)
    assert computed == [batch.tokens_BT.numel(), slots]
    assert len(kept[1]) < slots < 2 * len(kept[1])
    for depth, states_1nD in drafted.states_BTD.items():
        dense_nD = whole.states_BTD[depth].flatten(0, 1)[kept[depth]]
        torch.testing.assert_close(states_1nD[0], dense_nD, rtol=0, atol=1e-12)


def test_documents_packed_in_a_row_train_as_they_do_apart(target):
    drafter = p_eagle(target).train()
    together = loss_of(drafter, batch_of(target, drafter, [0, 1, 2], width=60))
    apart = [loss_of(drafter, batch_of(target, drafter, [number], width=30)) for number in (0, 2)]
    assert float(together.total.detach()) == pytest.approx(sum(float(one.total.detach()) for one in apart), rel=1e-6)
    whole, *parts = [gradients(drafter, one.total) for one in (together, *apart)]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "d_pace"])
def test_recomputed_activations_and_padded_slots_give_the_same_gradients(target, kind, monkeypatch):
    drafter = p_eagle(target).train()
    batch = batch_of(target, drafter, [0, 1, 2])
    plain = gradients(drafter, loss_of(drafter, batch, kind).total)
    drafter.recompute_activations()
    monkeypatch.setattr("drafttrain.drafters.p_eagle.module.is_compiled_by_size", lambda *_: True)
    monkeypatch.setattr("drafttrain.drafters.p_eagle.slots.few_sizes", lambda count: -(-count // 16) * 16)
    computed: list[int] = []
    drafter.layers["1"].mlp.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
    for name, gradient in gradients(drafter, loss_of(drafter, batch, kind).total).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-6)
    assert computed[1] % 16 == 0


def test_the_mask_vector_is_trained_by_deeper_depths_only(target):
    """Without a mask slot its gradient is zero, and still there: every process runs the same modules."""
    drafter = p_eagle(target, depth_ratio=0.7).train()
    found = {}
    for name, mask in {"kept": MASKS[0], "one row": [i == 20 for i in range(30)], "none": [False] * 30}.items():
        batch, _ = pack([Record("0", TEXTS[0], mask)], width=30, weight_of_step=1.0)
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
        found[name] = gradients(drafter, loss_of(drafter, batch).total)
    assert {name: bool(given["mask_hidden"].any()) for name, given in found.items()} == {
        "kept": True,
        "one row": False,
        "none": False,
    }
    assert bool(found["one row"]["fc.weight"].any())
    assert all(bool(gradient.isfinite().all()) for given in found.values() for gradient in given.values())
    shallow = p_eagle(target, num_depths=1).train()
    assert "mask_hidden" not in gradients(shallow, loss_of(shallow, batch_of(target, shallow, [0])).total)


def test_a_batch_of_padding_runs_one_mask_slot(target):
    drafter = p_eagle(target).train()
    batch = batch_of(target, drafter, [0, 1, 2])
    batch = replace(as_padding(batch), target=batch.target, target_rows=batch.target_rows)
    assert {states_1nD.shape[1] for states_1nD in drafter(batch).states_BTD.values()} == {1}


def formula(
    *, width: int, taps: int, layers: int, heads: int, groups: int, size: int, inner: int, rows: int, norms: int = 0
) -> int:
    """Return the parameters of a drafter: the first layer reads two vectors, and has one norm more."""
    of_layer = 2 * width * heads * size + 2 * width * groups * size + 3 * width * inner + 2 * width
    first = width * (heads + 2 * groups) * size + width
    return taps * width**2 + taps * width + layers * of_layer + first + width + rows * width + norms * width


def test_the_parameters_are_those_of_the_formula(target):
    sizes = {"width": 32, "taps": 3, "layers": 2, "heads": 4, "groups": 2, "size": 8, "inner": 64, "rows": 200}
    count = lambda drafter: sum(parameter.numel() for parameter in drafter.parameters())  # noqa: E731
    assert count(p_eagle(target, draft_vocab_size=200)) == formula(**sizes)
    assert count(p_eagle(target, draft_vocab_size=200, fc_norm=True)) == formula(**sizes, norms=3)
    eight_b = {"width": 4096, "taps": 3, "layers": 4, "heads": 32, "groups": 8, "size": 128, "inner": 12288}
    assert formula(**eight_b, rows=32000) == 978_374_656  # as speculators' has, without its embedding


def test_the_products_are_those_of_the_modules(target):
    """Counted by hooks on every linear layer, over a text whose labels have no gaps."""
    drafter = p_eagle(target).train()
    batch, _ = pack([Record("0", TEXTS[0], [i >= 4 for i in range(30)])], width=30, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    counted: Counter[str] = Counter()
    for name, module in drafter.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: counted.update(
                    {name: module.weight.numel() * inputs[0].flatten(0, -2).shape[0]}
                )
            )
    drafter(batch)
    products = list(drafter.products(batch.shape))
    # One mask slot more passes the fusion and the first layer's projections.
    entry = sum(
        module.weight.numel()
        for name, module in drafter.named_modules()
        if name == "fc" or (name.startswith("midlayer.self_attn.") and name[-6] in "qkv")
    )
    of_head = [drafter.lm_head.weight.numel() * rows for rows in (26, 17 + 11 + 7)]
    matrices = sum(products[i].multiplications for i in (0, 1, 4))
    assert matrices == sum(counted.values()) - entry
    assert [products[i].multiplications for i in (3, 6)] == of_head


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_files_read_back(target, tmp_path, settings):
    drafter = p_eagle(target, **settings)
    drafter.save(tmp_path)
    again = PEagleDrafter.load(tmp_path, target, "float64")
    assert again.config == drafter.config
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    assert torch.equal(logits_of(drafter, batch), logits_of(again, batch))


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("mask_token_id",), 257, "mask_token_id"),
        (("mask_token_id",), None, "mask_token_id"),
        (("num_hidden_layers",), 0, "num_hidden_layers"),
        (("drafttrain", "num_depths"), 0, "num_depths"),
        (("drafttrain", "depth_ratio"), "much", "depth_ratio"),
        (("hidden_size",), 64, "hidden_size"),
    ],
)
def test_a_wrong_field_is_named(target, tmp_path, place, value, named):
    p_eagle(target).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=named):
        PEagleDrafter.load(tmp_path, target)


def test_settings_name_what_is_wrong(target):
    wrong = PEagleSettings(checkpoint="x", num_layers=2, mask_token_id=1)
    assert {line.partition(":")[0] for line in wrong.check()} == {"num_layers", "mask_token_id"}
    assert PEagleSettings().smoke().num_layers == 2
    with pytest.raises(CheckpointError, match=r"drafter\.mask_token_id"):
        p_eagle(target, mask_token_id=MASK + 1)
    assert not PEagleSettings(**SETTINGS).check()
