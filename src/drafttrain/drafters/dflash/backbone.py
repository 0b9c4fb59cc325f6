"""The network that block drafters share: a fusion of the target's features, decoder layers, a final norm.

It is the same in training and in decoding, which differ only in how a slot attends to the context.

A = blocks, B = slots of a block, T = positions, N = rows, D = hidden, F = width of all features together, R = the drafter's
vocabulary, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.dflash.config import taps_in
from drafttrain.drafters.dflash.layer import Attend, BlockLayer, Turn
from drafttrain.drafters.eagle.layer import Norm, Rotary, compute_dtype
from drafttrain.drafters.eagle.layer_config import llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.recomputing import run_part


class Backbone(nn.Module):
    """Context vectors c_j = norm(fc(features of token j)); a block of [root, mask, ...]; layers in which it reads both.

    Source: DFlash, arXiv 2602.06036.
    """

    recomputing: bool
    """See `Drafter`."""

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__()
        self.config = config
        self.taps = taps_in(config)
        self.block_size: int = config["block_size"]
        self.causal: bool = config["dflash_config"].get("causal", False)
        self.mask_token_id: int = config["dflash_config"]["mask_token_id"]
        self.first_slot = 0 if config.get("sample_from_anchor") else 1
        """The slot that predicts the token after the root."""
        self._parts = parts
        sizes, width, eps = llama_config(config), config["hidden_size"], config["rms_norm_eps"]
        self._rotary = Rotary(sizes)
        self.fc = nn.Linear(len(self.taps) * width, width, bias=False)
        nn.init.normal_(self.fc.weight, std=sizes.initializer_range)
        self.hidden_norm = Norm(width, eps=eps)
        self.layers = nn.ModuleList(self.new_layer(sizes) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(width, eps=eps)

    def new_layer(self, sizes: Any) -> BlockLayer:
        """Return an untrained layer. A kind may have layers of its own.

        Args:
            sizes: `LlamaConfig` of the layer.
        """
        return BlockLayer(sizes)

    @property
    def num_depths(self) -> int:
        """Draft tokens of a block."""
        return self.block_size - self.first_slot

    @property
    def each_layer(self) -> Sequence[BlockLayer]:
        """The layers, in order."""
        return cast("Sequence[BlockLayer]", list(self.layers))

    def needs(self) -> TargetNeeds:
        """Return the tapped states."""
        return TargetNeeds(hidden=self.taps)

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTF: the tapped states, concatenated."""
        tapped = [seen.hidden_BTD[tap] for tap in self.taps]
        return torch.cat(tapped, dim=-1).to(self.fc.weight.device, compute_dtype(self.fc.weight))

    def turn(self, positions_AT: Tensor) -> Turn:
        """Return the rotary angles of positions."""
        return self._rotary(
            positions_AT, torch.empty(0, device=positions_AT.device, dtype=compute_dtype(self.fc.weight))
        )

    def context(self, features_ATF: Tensor, positions_AT: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, by layer, (keys_AGTd, values_AGTd) of positions whose features are known."""
        context_ATD, turn = self.hidden_norm(self.fc(features_ATF)), self.turn(positions_AT)
        return [layer.self_attn.keys_and_values(context_ATD, turn) for layer in self.each_layer]

    def block_states(self, roots_A: Tensor, positions_A: Tensor, attend: Sequence[Attend]) -> Tensor:
        """Return states_ABD of blocks, after the final norm.

        Args:
            roots_A: The token of each root.
            positions_A: Its position in its document.
            attend: By layer, how its slots attend.
        """
        slots_B = torch.arange(self.block_size, device=roots_A.device)
        turn = self.turn(positions_A[:, None] + slots_B)
        tokens_AB = roots_A[:, None].where(slots_B == 0, self.mask_token_id)
        stream_ABD = self._parts.embed(tokens_AB, dtype=compute_dtype(self.fc.weight))
        for layer, of_layer in zip(self.each_layer, attend, strict=True):
            through: Callable[[Tensor], Tensor] = partial(layer, turn=turn, attend=of_layer)
            stream_ABD = run_part(through, stream_ABD, recompute=self.recomputing)
        normed_ABD: Tensor = self.norm(stream_ABD)
        return normed_ABD

    def predicting(self, states_ABD: Tensor) -> Tensor:
        """Return the states_AKD that predict the tokens after the root, in order."""
        return states_ABD[:, self.first_slot :]

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the layers except for their attention."""
        for layer in self.each_layer:
            for part, name in (
                (layer.self_attn, "queries"),
                (layer.self_attn, "keys_and_values"),
                (layer.mlp, "forward"),
            ):
                part.__dict__[name] = compiled(getattr(part, name))

    def layer_weights(self) -> tuple[Weights, Weights]:
        """Return (the weights that the context passes through, those that a block does)."""
        keys = [each for layer in self.each_layer for each in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        width = sum(layer.self_attn.q_proj.out_features for layer in self.each_layer)
        return weights_of(self.fc, self.hidden_norm, *keys), weights_of(self.layers, self.norm, attention_width=width)
