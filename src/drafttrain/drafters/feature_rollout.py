"""The training-time test: a drafter that feeds on its own states is trained on the states that it will meet.

B = sequences, T = positions, D = hidden, F = width of what is read of the target, R = the drafter's vocabulary
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from drafttrain.core.packed_documents import PackedDocuments
from drafttrain.core.records import DraftBatch, TargetNeeds, TargetOutput
from drafttrain.drafters.feature_layer import FeatureLayer
from drafttrain.target.packed_attention import Columns


class FeatureModel(Protocol):
    """What a rollout and a proposer need of a drafter that reads the target's features.

    Slot t holds the target's features of token t and the embedding of token t + 1; the layer's state there says token t + 2.
    Each further draft token embeds the token before it and takes the layer's last state in place of the features.
    """

    @property
    def layer(self) -> FeatureLayer:
        """The decoder layer."""
        ...

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token of the drafter; None: the vocabularies are the same."""
        ...

    def needs(self) -> TargetNeeds:
        """Return what is read of the target."""
        ...

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTF of what the target knows."""
        ...

    def fused(self, features_BTF: Tensor) -> Tensor:
        """Return hidden_BTD of the features, in the width of the layer."""
        ...

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return embedded_BTD, by the target's own embedding."""
        ...

    def entering(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (what the layer's projections read, the stream that its output is added to)."""
        ...

    def fed_back(self, state_BTD: Tensor) -> Tensor:
        """Return the hidden input of the next draft token, from the layer's state."""
        ...

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NR of the layer's states."""
        ...

    def weight_bytes(self) -> tuple[int, int, int, int]:
        """Return the bytes of: what fuses features, the layer, the head, an embedding row."""
        ...


def rollout(model: FeatureModel, batch: DraftBatch, hidden_BTD: Tensor, *, num_steps: int) -> dict[int, Tensor]:
    """Return the layer's states of depths 1..num_steps, at every slot of packed rows.

    Step k = 0, 1, ... embeds the token k + 1 places ahead at position t + k, and takes the state of the step before at the same
    slot. It sees the keys of the features (step 0) up to its slot in its document, and of the steps since then only its
    own: what a chain of k draft tokens after slot t would hold in its cache.

    Source: Li et al. 2025, EAGLE-3, arXiv 2503.01840, 3.2.
    """
    states: dict[int, Tensor] = {}
    # What follows the row's end, and the document's, is never read by a row that is trained.
    tokens_BT = batch.tokens_BT
    columns: Columns | None = None
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(num_steps):
        tokens_BT = tokens_BT.roll(-1, dims=1)
        inputs_BTX, residual_BTD = model.entering(model.embed(tokens_BT), hidden_BTD)
        query, key, value = model.layer.project(inputs_BTX, batch.positions_BT + step)
        if columns is None:
            columns = Columns(key, value, PackedDocuments.of(batch.positions_BT))
        else:
            own.append((key, value))
        states[step + 1] = model.layer.finish(columns.attend(query, own), residual_BTD)
        hidden_BTD = model.fed_back(states[step + 1])
    return states
