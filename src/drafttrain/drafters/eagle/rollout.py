"""EAGLE-3's training-time test: the drafter is trained on its own states, as it will meet them at inference.

B = sequences, T = positions, D = hidden, F = width of what is read of the target, R = the drafter's vocabulary,
X = width of what the layer's projections read, C, M: see `core.batches`, H = heads, d = width of a head
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from drafttrain.core.batches import DraftBatch, ReadSlots
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters.eagle.layer import EagleLayer
from drafttrain.target_model.packed_attention import Columns


class EagleModel(Protocol):
    """What a rollout and a proposer need from an EAGLE drafter.

    Slot t combines the target's features of token t with the embedding of token t + 1; the layer's state there predicts
    token t + 2. For each further draft token, the layer reads the embedding of the token before it, and its own last state
    in place of the features.
    """

    @property
    def layer(self) -> EagleLayer:
        """The decoder layer."""
        ...

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's vocabulary; None: the vocabularies are the same."""
        ...

    def needs(self) -> TargetNeeds:
        """Return what is read from the target."""
        ...

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTF from the target's outputs."""
        ...

    def fused(self, features_BTF: Tensor) -> Tensor:
        """Return the features as hidden_BTD, in the width of the layer."""
        ...

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return embedded_BTD from the target's own embedding."""
        ...

    def entering(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the input of the layer's projections, the residual stream)."""
        ...

    def fed_back(self, state_BTD: Tensor) -> Tensor:
        """Return the hidden input of the next draft token, made from the layer's state."""
        ...

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NR from the layer's states."""
        ...

    def weight_bytes(self) -> tuple[int, int, int, int]:
        """Return the bytes of (the fusion of features, the layer, the head, one embedding row)."""
        ...


def rollout(
    model: EagleModel, batch: DraftBatch, features_BTF: Tensor, *, num_steps: int, slots: ReadSlots
) -> dict[int, Tensor]:
    """Return the layer's states of depths 1..num_steps at the slots that are read; 0 elsewhere.

    Step k = 0, 1, ... embeds the token k + 1 places ahead at position t + k, and reads the state of step k - 1 at the same
    slot. It attends to the keys of step 0 up to its slot, within its document, and to the keys of later steps at its own
    slot only: exactly the cache of a chain of k draft tokens after slot t.

    Source: Li et al. 2025, EAGLE-3, arXiv 2503.01840, 3.2.
    """
    positions_1C, hidden_1CD = slots.columns(batch.positions_BT), model.fused(slots.columns(features_BTF))
    inputs_1CX, residual_1CD = model.entering(model.embed(_ahead(batch, slots, 1)), hidden_1CD)
    columns = Columns(*model.layer.keys_and_values(inputs_1CX, positions_1C), slots.documents)
    # From here on the layer computes only the slots that are read.
    inputs_1MX, residual_1MD, positions_1M = map(slots.queries, (inputs_1CX, residual_1CD, positions_1C))
    own: list[tuple[Tensor, Tensor]] = []
    states: dict[int, Tensor] = {}
    for step in range(num_steps):
        if step:
            hidden_1MD = model.fed_back(states[step])
            embedded_1MD = model.embed(slots.queries(_ahead(batch, slots, step + 1)))
            inputs_1MX, residual_1MD = model.entering(embedded_1MD, hidden_1MD)
            own.append(model.layer.keys_and_values(inputs_1MX, positions_1M + step))
        query_1HMd = model.layer.queries(inputs_1MX, positions_1M + step)
        states[step + 1] = model.layer.finish(columns.attend(query_1HMd, own), residual_1MD)
    return {depth: slots.spread(state_1MD, batch.tokens_BT) for depth, state_1MD in states.items()}


def _ahead(batch: DraftBatch, slots: ReadSlots, places: int) -> Tensor:
    """Return the token `places` ahead of each column. No trained row reads beyond its document's end."""
    return slots.columns(batch.tokens_BT.flatten().roll(-places).view_as(batch.tokens_BT))
