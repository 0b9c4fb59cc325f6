"""Chimera in training: the states of every draft token after every slot, from one pass over the tokens.

B = sequences, T = positions, N = tokens of all rows of a batch, one after another, C, M: see `core.batches`, D = hidden,
H = heads (or groups of them), d = width of a head
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from drafttrain.core.batches import DraftBatch, ReadSlots
from drafttrain.drafters.chimera.trigrams import trigrams
from drafttrain.drafters.p_eagle.stack import DeepLayer
from drafttrain.drafters.recomputing import run_part
from drafttrain.target_model.packed_attention import Columns


class ChimeraLayers(Protocol):
    """What a rollout needs of the drafter."""

    @property
    def layer(self) -> DeepLayer:
        """The decoder layer."""
        ...

    def trigram_states(self, tokens_BN3: Tensor) -> Tensor:
        """Return states_BND of trigrams."""
        ...


def rollout(
    model: ChimeraLayers,
    batch: DraftBatch,
    features_BTD: Tensor,
    *,
    num_steps: int,
    slots: ReadSlots,
    recompute: bool = False,
) -> dict[int, Tensor]:
    """Return states_1MD of depths 1..num_steps at the slots that are read.

    The state of depth k at slot t is that of token t + k. It attends to the target's features up to slot t within its document, and
    to the trigram states of tokens t + 1 .. t + k. What it reads of a newer token does not depend on the slot, so each token passes the
    trigram encoder and the layer's projections once.

    Args:
        recompute: Store the inputs of each part only, and compute the rest again in the backward pass.
    """
    layer, shape = model.layer, batch.tokens_BT.shape

    def newer(tokens_1N3: Tensor) -> tuple[Tensor, ...]:
        """Return the trigram state of each token, and its query, key and value."""
        entering_1ND, stream_1ND = layer.entering(model.trigram_states(tokens_1N3))
        return stream_1ND, *layer.project(entering_1ND, batch.positions_BT.flatten()[None])

    def known(features_1CD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the target's features."""
        return layer.keys_and_values(layer.entering(features_1CD)[0], slots.columns(batch.positions_BT))

    def at(states_1NX: Tensor, places: int) -> Tensor:
        """Return states_1MX of the token `places` after each slot. No trained row reads beyond its document's end."""
        return slots.queries(slots.columns(states_1NX[0].roll(-places, dims=0).unflatten(0, shape)))

    def heads_at(states_1HNd: Tensor, places: int) -> Tensor:
        return at(states_1HNd.transpose(1, 2), places).transpose(1, 2)

    tokens_1N3 = trigrams(batch.tokens_BT, batch.positions_BT).flatten(0, 1)[None]
    stream_1ND, query, key, value = run_part(newer, tokens_1N3, recompute=recompute)
    columns = Columns(*run_part(known, slots.columns(features_BTD), recompute=recompute), slots.documents)
    states: dict[int, Tensor] = {}
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(1, num_steps + 1):
        own.append((heads_at(key, step), heads_at(value, step)))
        attended_1HMd = columns.attend(heads_at(query, step), own)
        states[step] = run_part(layer.finish, attended_1HMd, at(stream_1ND, step), recompute=recompute)
    return states
