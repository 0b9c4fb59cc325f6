"""What a rollout and a proposer need from a drafter that reads features of the target and then its own states.

B = sequences, T = positions, D = hidden, F = width of the target features, R = the drafter's vocabulary,
X = input width of the layer's projections, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.weights import Weights


class DecodingLayer(Protocol):
    """A decoder layer as decoding runs it, around the attention."""

    def project(self, inputs_BTX: Tensor, positions_BT: Tensor, *, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHTd, key_BGTd, value_BGTd); `last` is the largest position."""
        ...

    def finish(self, attended_BHTd: Tensor, residual_BTD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        ...


class DraftLayer(Protocol):
    """A decoder layer as a rollout runs it, around the attention. All heads of keys and values are as wide as the queries'."""

    def queries(self, inputs_BTX: Tensor, positions_BT: Tensor) -> Tensor:
        """Return query_BHTd."""
        ...

    def keys_and_values(self, inputs_BTX: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return (key_BGTd, value_BGTd)."""
        ...

    def finish(self, attended_BHTd: Tensor, residual_BTD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        ...

    def decoding(self) -> DecodingLayer:
        """Return the layer as decoding runs it, with its weights prepared once."""
        ...


class EagleModel(Protocol):
    """What a rollout and a proposer need from an EAGLE drafter.

    Slot t combines the target's features of token t with the embedding of token t + 1; the layer's state there predicts
    token t + 2. For each further draft token, the layer reads the embedding of the token before it, and its own last state
    in place of the features.
    """

    draft: str
    """See `Drafter.draft`."""

    @property
    def layer(self) -> DraftLayer:
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

    def embed_at(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return embedded_BTD from the target's own embedding, for slots at these positions."""
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

    def decoding_head(self) -> Callable[[Tensor], Tensor]:
        """Return `head` as decoding calls it, with its weights prepared once."""
        ...

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the fusion of features, the layer, the head), and the bytes of one embedding row."""
        ...
