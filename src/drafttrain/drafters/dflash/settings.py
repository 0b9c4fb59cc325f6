"""The settings that all block drafters share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from drafttrain.core.settings import setting
from drafttrain.drafters.draft_vocabulary import SIZE_HELP
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, lora_problems
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, settings_fixed_by_checkpoint

FIXED_BY_CHECKPOINT = (
    *("num_layers", "taps", "block_size", "causal", "sample_from_anchor", "mask_token_id"),
    *("num_heads", "num_kv_heads", "head_dim", "intermediate_size", "draft_vocab_size"),
)
"""Settings that the checkpoint to start from fixes."""

OWN = ("gamma", "anchors", "draft")
"""Settings of training and drafting, stored in the drafter folder."""


@dataclass
class BlockSettings:
    """A drafter that fills a block of mask tokens in one pass, with the target's features as context."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP)
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    num_layers: int = setting(5, help="Decoder layers of the drafter.", ge=1)
    taps: list[int] | None = setting(
        None,
        help="Blocks of 0..layers - 1, in rising order, whose input states are the context; null: as many as the drafter "
        "has layers, evenly from an early one to a late one.",
        ge=0,
    )
    block_size: int = setting(
        16, help="Slots of a block: the root and its mask tokens. Inference uses the same number.", ge=1
    )
    gamma: float = setting(
        7.0,
        help="The loss of depth d has weight exp(-(d - 1) / gamma). Published: 7 for blocks of 16, 5 for 10, 4 for 7 or 8.",
        gt=0,
    )
    anchors: int = setting(
        512, help="Roots drawn in each document in each step, without replacement; their blocks are trained.", ge=1
    )
    causal: bool = setting(
        False, help="A slot attends only to the slots up to its own (JetSpec); false: to all slots of its block."
    )
    sample_from_anchor: bool = setting(
        False,
        help="Slot s predicts token s + 1 after the root, so the root's slot predicts too; false: slot s predicts token s.",
    )
    mask_token_id: int | None = setting(
        None, help="The token that the mask slots embed; null: an id of the target's vocabulary that no text has.", ge=0
    )
    num_heads: int | None = setting(None, help="Attention heads; null: the target's.", ge=1)
    num_kv_heads: int | None = setting(None, help="Key-value heads; null: the target's.", ge=1)
    head_dim: int | None = setting(None, help="Width of a head, even; null: the target's.", ge=2)
    intermediate_size: int | None = setting(None, help="Feed-forward width; null: the target's.", ge=1)
    draft_vocab_size: int | None = setting(
        None,
        help=f"{SIZE_HELP[:-1]}, with the target's own frozen head. A number gives the drafter a head to train.",
        ge=1,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = settings_fixed_by_checkpoint(self, FIXED_BY_CHECKPOINT)
        if self.taps is not None and (not self.taps or sorted(set(self.taps)) != self.taps):
            problems.append(f"taps: one or more different blocks in rising order are needed, got {self.taps}")
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim and self.head_dim % 2:
            problems.append(
                f"head_dim: must be even, because rotary angles turn pairs of coordinates, got {self.head_dim}"
            )
        if self.block_size < 2 and not self.sample_from_anchor:
            problems.append("block_size: must be 2 or more, because the root's slot predicts nothing, got 1")
        return problems + lora_problems(self.lora, starts_from=self.checkpoint)

    def smoke(self) -> Self:
        """Return a copy with few layers and blocks, enough for a test. A checkpoint fixes the layers."""
        few: dict[str, Any] = {"anchors": min(self.anchors, 16)}
        if self.checkpoint is None and self.taps is None:
            few["num_layers"] = min(self.num_layers, 2)
        return replace(self, **few)
