"""The training-time test against real drafting: the logits of step k are those of a chain of k tokens with its cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.records import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import feature_layer
from drafttrain.losses.align import align
from drafttrain.target.packed_attention import Columns
from tests.drafters.feature_models import chain_logits, feature_drafter, feature_target, packed

STEPS = 4
LENGTHS = (9, 7, 12)
KINDS = [
    ("eagle3", {}),
    ("eagle3", {"fc_norm": True, "norm_output": True, "norm_before_residual": True}),
    ("eagle3", {"norm_before_fc": True}),
    ("eagle", {}),
]


@pytest.fixture(scope="module")
def target() -> Any:
    return feature_target()


def largest_difference(target: Any, drafter: Any, *, width: int) -> list[float]:
    """Return by step the largest difference between the rollout of packed rows and chains drafted one by one."""
    batch, places = packed(target, drafter, LENGTHS, width=width)
    with torch.no_grad():
        states = drafter(replace(batch, num_depths=STEPS)).states_BTD
        worst = [0.0] * STEPS
        for (row, column), length in zip(places, LENGTHS, strict=True):
            tokens = batch.tokens_BT[row, column : column + length].tolist()
            for slot in range(length - STEPS):
                for step, logits in enumerate(chain_logits(drafter, target, tokens, slot, STEPS)):
                    ours = drafter.head(states[step + 1][row, column + slot][None], step + 1)[0]
                    worst[step] = max(worst[step], float((ours - logits).abs().max()))
    return worst


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("width", [12, 22])  # one document a row, padded; two documents in a row
def test_step_k_of_the_rollout_is_a_chain_of_k_draft_tokens(target, kind, settings, width):
    drafter = feature_drafter(kind, target, **settings)
    assert max(largest_difference(target, drafter, width=width)) < 1e-5


def test_the_identity_holds_in_float32(target):
    drafter = feature_drafter("eagle3", target, scale=0.1).float()
    assert max(largest_difference(target, drafter, width=22)) < 1e-5


def test_control_a_position_that_does_not_advance_breaks_the_identity(target, monkeypatch):
    drafter = feature_drafter("eagle3", target)
    project = feature_layer.FeatureLayer.project
    batch, _ = packed(target, drafter, LENGTHS, width=22)

    def stuck(self: Any, inputs: Any, positions: Any) -> Any:
        whole = positions.shape == batch.positions_BT.shape
        return project(self, inputs, batch.positions_BT if whole else positions)

    monkeypatch.setattr(feature_layer.FeatureLayer, "project", stuck)
    differences = largest_difference(target, drafter, width=22)
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-2


def test_control_a_missing_key_of_its_own_breaks_the_identity(target, monkeypatch):
    drafter = feature_drafter("eagle3", target)
    attend = Columns.attend
    monkeypatch.setattr(Columns, "attend", lambda self, query, own: attend(self, query, own[-1:]))
    differences = largest_difference(target, drafter, width=22)
    assert max(differences[:2]) < 1e-5
    assert min(differences[2:]) > 1e-2


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_the_loss_of_a_copy_task_is_low_at_its_own_shift_only(target, kind):
    """Row t of depth d is the law of token t + d + 1: a head that says the last token that was embedded says token t + d."""
    drafter = feature_drafter(kind, target)
    texts = [list(range(5, 16)), list(range(40, 60))]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()), num_depths=3)
    said: dict[int, Any] = {}
    embed = drafter.embed
    steps = itertools.count(1)

    def watched(tokens: Any) -> Any:
        said[next(steps)] = tokens
        return embed(tokens)

    drafter.embed = watched
    drafted = drafter(batch)
    rows = align(drafted, batch)
    # Texts that count: the token after the one that was embedded last is the label, at this shift and at no other.
    embedded_N = torch.cat([said[d].flatten()[rows.drafter_N[rows.index.depth_N == d]] for d in (1, 2, 3)])
    assert torch.equal(embedded_N + 1, rows.tokens_N)
    for wrong in (0, 2):
        moved = align(replace(drafted, lag=wrong), batch)
        embedded_N = torch.cat([said[d].flatten()[moved.drafter_N[moved.index.depth_N == d]] for d in (1, 2, 3)])
        assert (embedded_N + 1 == moved.tokens_N).float().mean() < 0.1
