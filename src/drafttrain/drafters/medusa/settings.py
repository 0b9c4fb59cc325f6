"""The settings of Medusa's heads, and of the adapters that Medusa-2 trains with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from drafttrain.core.settings import setting
from drafttrain.drafters.draft_vocabulary import SIZE_HELP
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.tuned_target import target_lora_problems
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, settings_fixed_by_checkpoint


@dataclass
class JointSettings:
    """Medusa-2: low-rank adapters on the target are trained together with the heads.

    A KL divergence from the same network without adapters preserves the target's own distribution.
    """

    lora: LoraSettings = setting(LoraSettings(dropout=0.05), help="The adapters.")
    head_coefficient: float = setting(0.2, help="Weight of the heads' loss next to the target's KL.", gt=0)
    head_warmup_steps: int = setting(
        0, help="Steps over which this factor rises from 0 as sin(pi/2 step/steps); 0: constant.", ge=0
    )
    head_lr_multiplier: float = setting(
        4.0, help="The heads learn at train.lr times this, the adapters at train.lr.", gt=0
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return target_lora_problems(self.lora)

    def coefficient(self, step: int) -> float:
        """Return the factor on the heads' loss at an optimizer step, from 0."""
        if step >= self.head_warmup_steps:
            return self.head_coefficient
        return self.head_coefficient * math.sin(math.pi / 2 * step / self.head_warmup_steps)


@dataclass
class MedusaSettings:
    """Heads on the target's final hidden state."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP)
    num_heads: int = setting(4, help="Heads; head k predicts the token k places after the root.", ge=1)
    num_layers: int = setting(1, help="Residual blocks per head.", ge=1)
    draft_vocab_size: int | None = setting(None, help=SIZE_HELP, ge=1)
    shared_head: bool = setting(
        False,
        help="All heads share one output matrix.",
    )
    decay: float = setting(0.8, help="The loss of head k has weight decay^k.", gt=0, le=1)
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="Chains at temperature > 0: a draw from each head, or each head's argmax as vLLM drafts."
    )
    joint: JointSettings | None = setting(
        None,
        help="Medusa-2: adapters on the target, trained with the heads; null: Medusa-1, the target stays as it is.",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return settings_fixed_by_checkpoint(self, ("num_heads", "num_layers", "draft_vocab_size", "shared_head"))
