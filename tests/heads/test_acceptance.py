"""The acceptance head: optimum of its loss, separate blocks, and its folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.heads.acceptance import AcceptanceHead, AcceptanceSettings, prior_corrected
from drafttrain.heads.folder import check_made_for, load_head
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import MadeFor, probabilities
from drafttrain.target_model.folders import fingerprint_of


def head(**settings: object) -> AcceptanceHead:
    torch.manual_seed(0)
    return AcceptanceHead(AcceptanceSettings(**settings), 8)


def best_score(one: AcceptanceHead, label: float) -> float:
    """Return the sigmoid that minimizes the loss of a label, by a fine grid."""
    scores_N = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    loss_N = one.loss(scores_N, torch.full_like(scores_N, label))
    return float(scores_N[loss_N.argmin()].sigmoid())


@pytest.mark.parametrize("weight", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("label", [0.05, 0.5, 0.9])
def test_the_weighted_optimum_is_pessimistic_and_prior_correct_removes_that(weight, label):
    """The optimum is a / (a + w (1 - a)), not a."""
    found = best_score(head(reject_weight=weight), label)
    assert found == pytest.approx(label / (label + weight * (1 - label)), abs=1e-4)
    if weight != 1:
        assert abs(found - label) > 0.01  # the control: uncorrected, it is biased
    assert float(prior_corrected(torch.tensor(found), weight)) == pytest.approx(label, abs=1e-3)


def test_the_published_example_of_the_bias():
    assert best_score(head(reject_weight=6.0), 0.5) == pytest.approx(1 / 7, abs=1e-4)


def test_one_sigmoid_output_is_the_published_two_output_softmax():
    scores_N2 = torch.randn(5, 2, dtype=torch.float64)
    labels_N = torch.rand(5, dtype=torch.float64)
    log_N2 = scores_N2.log_softmax(-1)
    expected_N = 6 * (1 - labels_N) * -log_N2[:, 0] + labels_N * -log_N2[:, 1]
    torch.testing.assert_close(head().loss(scores_N2[:, 1] - scores_N2[:, 0], labels_N), expected_N)


def test_blocks_have_their_own_weights():
    """`[block] * n` would be one block, n times."""
    one = head(num_blocks=3)
    assert sum(p.numel() for p in one.parameters()) == 3 * (8 * 8 + 8) + 8 + 1
    shared = torch.nn.ModuleList([one.blocks[0]] * 3)
    assert sum(p.numel() for p in shared.parameters()) == 8 * 8 + 8  # the control
    before = one(torch.ones(1, 8))
    with torch.no_grad():
        one.blocks[1].linear.weight.add_(1.0)
    assert not torch.equal(before, one(torch.ones(1, 8)))
    assert torch.equal(one.blocks[0].linear.weight, head(num_blocks=3).blocks[0].linear.weight)


def test_with_rms_norm_the_scale_of_a_state_does_not_matter():
    states_ND, factors_N1 = torch.randn(6, 8), torch.tensor([0.1, 1, 3, 20, 50, 400.0])[:, None]
    torch.testing.assert_close(
        head(rms_norm=True)(states_ND * factors_N1), head(rms_norm=True)(states_ND), rtol=0, atol=1e-3
    )
    assert not torch.allclose(head()(states_ND * factors_N1), head()(states_ND), atol=0.1)  # the control


def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches():
    from drafttrain.data_gen.stored.labelled_tokens import RowOrder
    from drafttrain.losses.step import share_of_step

    one = head()
    rows = HeadRows(torch.randn(40, 8), torch.rand(40))
    order = RowOrder(rows, one, seed=0)
    sums = []
    for records_per_device in (None, 6, 5):
        parts = order.of_step(3, batch_size=12, records_per_device=records_per_device)
        accumulation = len(parts)
        losses = [
            share_of_step(
                one.loss(one(b.rows.features_ND), b.rows.labels_N).sum(), b, world_size=1, accumulation=accumulation
            )
            for b in parts
        ]
        sums.append(float(sum(losses).detach()) / accumulation)
    chosen = torch.cat([b.rows.labels_N for b in order.of_step(3, batch_size=12)])
    whole = torch.cat([b.rows.features_ND for b in order.of_step(3, batch_size=12)])
    expected = float(one.loss(one(whole), chosen).sum().detach() / (6 * (1 - chosen) + chosen).sum())
    assert sums == pytest.approx([expected] * 3, rel=1e-5)


def test_a_folder_gives_the_same_head_back(tmp_path):
    one = head(num_blocks=2, reject_weight=3.0)
    made_for = MadeFor("t", "1", "d", "2")
    one.save(tmp_path, made_for)
    loaded = load_head(tmp_path, kind="acceptance")
    rows = HeadRows(torch.randn(9, 8), torch.rand(9))
    torch.testing.assert_close(probabilities(loaded.head, rows), probabilities(one, rows), rtol=0, atol=0)
    assert loaded.made_for == made_for
    assert not any(p.requires_grad for p in loaded.head.parameters())


def test_a_folder_without_such_a_head_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not the folder of a head: it has no config\.json"):
        load_head(tmp_path, kind="acceptance")
    head().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "other"}))
    with pytest.raises(CheckpointError, match="kind 'other', but 'acceptance' is needed"):
        load_head(tmp_path, kind="acceptance")
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(CheckpointError, match="tensors are wrong"):
        load_head(tmp_path, kind="acceptance")


def test_a_head_is_refused_with_other_models_than_it_was_made_for(tmp_path, tiny_target, save_llama):
    drafter, other = save_llama(seed=0, num_layers=1), save_llama(seed=1, num_layers=1)
    own = MadeFor(tiny_target.name, tiny_target.fingerprint, str(drafter), fingerprint_of(drafter))
    folders = {name: tmp_path / name for name in ("own", "of_another_target", "of_unknown_models")}
    for folder in folders.values():
        folder.mkdir()
    head().save(folders["own"], own)
    head().save(folders["of_another_target"], replace(own, target="other/target", target_fingerprint="0" * 16))
    head().save(folders["of_unknown_models"])
    check_made_for(folders["own"], target=tiny_target, drafter=drafter)
    check_made_for(folders["of_unknown_models"], target=tiny_target, drafter=other)
    for name, used, message in [
        ("own", other, "made for the drafter"),
        ("of_another_target", drafter, r"made for the target other/target \(0{16}\), not"),
        ("of_another_target", other, r"made for the target .* and the drafter"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            check_made_for(folders[name], target=tiny_target, drafter=used)
