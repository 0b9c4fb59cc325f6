"""The settings of Chimera."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from drafttrain.core.settings import setting
from drafttrain.drafters.draft_vocabulary import SIZE_HELP
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, lora_problems
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, settings_fixed_by_checkpoint

OWN = ("num_steps", "step_decay", "draft")
"""Settings that are stored in the drafter folder."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of the settings that are stored in the drafter folder."""
    return {name: getattr(ChimeraSettings(), name) for name in OWN}


@dataclass
class ChimeraSettings:
    """One layer over the target's final states and trigrams of newer tokens, and a head for every draft token (Chimera)."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP)
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    num_steps: int = setting(4, help="Draft tokens of a round, each with a head of its own.", ge=1)
    shared_head: bool = setting(
        False, help="All draft tokens share one head. A head has twice as many weights as the target's."
    )
    draft_vocab_size: int | None = setting(None, help=SIZE_HELP, ge=1)
    step_decay: float = setting(
        1.0, help="Factor on the loss from one draft token to the next; 1 as in the authors' code.", gt=0, le=1
    )
    num_heads: int | None = setting(None, help="Attention heads; null: the target's.", ge=1)
    num_kv_heads: int | None = setting(None, help="Key-value heads; null: the target's.", ge=1)
    intermediate_size: int | None = setting(None, help="Feed-forward width; null: the target's.", ge=1)
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax (then nodes are FIXED)."
    )
    fixed: ClassVar[tuple[str, ...]] = (
        *("num_steps", "shared_head", "draft_vocab_size"),
        *("num_heads", "num_kv_heads", "intermediate_size"),
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = settings_fixed_by_checkpoint(self, self.fixed)
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        return problems + lora_problems(self.lora, starts_from=self.checkpoint)

    def smoke(self) -> ChimeraSettings:
        """Return a copy with few draft tokens, enough for a test. A checkpoint fixes their number."""
        return self if self.checkpoint is not None else replace(self, num_steps=min(self.num_steps, 2))
