"""The settings of P-EAGLE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from drafttrain.core.printable import shown
from drafttrain.core.settings import setting
from drafttrain.drafters.eagle.eagle3 import FIXED_BY_CHECKPOINT, FusionSettings

OWN = ("num_depths", "depth_ratio", "depth_least", "head_init", "draft")
"""Settings that are stored in the drafter folder."""

OWN_EMBEDDING = "embed_requires_grad"
"""The field of config.json that tells that the drafter has an embedding of its own, named as in speculators."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of the settings that are stored in the drafter folder."""
    return {name: getattr(PEagleSettings(), name) for name in OWN}


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one line for every wrong field of config.json that P-EAGLE has beyond EAGLE-3's."""
    found = []
    layers, mask, size = (config.get(key) for key in ("num_hidden_layers", "mask_token_id", "vocab_size"))
    if type(layers) is not int or not 1 <= layers <= 4096:
        found.append(f"config.json: num_hidden_layers must be a whole number of 1..4096, got {shown(layers)}")
    if type(mask) is not int or mask < 0 or (type(size) is int and mask >= size):
        found.append(f"config.json: mask_token_id must be an id of the target's vocabulary ({size}), got {shown(mask)}")
    if type(config.get(OWN_EMBEDDING, False)) is not bool:
        found.append(f"config.json: {OWN_EMBEDDING} must be true or false, got {shown(config[OWN_EMBEDDING])}")
    return found


@dataclass
class PEagleSettings(FusionSettings):
    """EAGLE-3 with several layers and mask slots: all draft tokens of a round in one pass (P-EAGLE)."""

    num_layers: int = setting(4, help="Decoder layers; the first one also reads the embedding.", ge=1)
    num_depths: int = setting(8, help="Draft tokens of one pass. Draft as many when serving.", ge=1)
    depth_ratio: float = setting(
        0.7, help="In training, share of a depth's rows that the next depth has, drawn again in every step.", gt=0, le=1
    )
    depth_least: float = setting(0.2, help="The least share of all rows that a depth is given.", ge=0, le=1)
    mask_token_id: int | None = setting(
        None, help="The token that the mask slots embed; null: an id of the target's vocabulary that no text has.", ge=0
    )
    train_embedding: bool = setting(
        False, help="Train an own embedding, which starts as the target's; false: read the target's."
    )
    draft: Literal["greedy"] = setting(
        "greedy",
        help="At every temperature the chain is the argmax of each slot, and its tokens are FIXED: slots do not know each "
        "other's tokens, so drawing each of them gives incoherent text.",
    )
    fixed: ClassVar[tuple[str, ...]] = (*FIXED_BY_CHECKPOINT, "num_layers", "mask_token_id", "train_embedding")

    def smoke(self) -> PEagleSettings:
        """Return a copy with few layers and depths, enough for a test. A checkpoint fixes the layers."""
        layers = self.num_layers if self.checkpoint is not None else min(self.num_layers, 2)
        return replace(self, num_layers=layers, num_depths=min(self.num_depths, 4))
