"""What a frontier of cascades is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from drafttrain.core.gpus import MEMORY_AND_BANDWIDTH, gpu_named
from drafttrain.core.settings import setting
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.kinds.entropy import EntropySettings
from drafttrain.eval.length import length_policies

COUNTED = ("bytes", "flops", "seconds")


@dataclass
class FrontierSettings:
    """A kind of cascade, and the values at which it is measured."""

    by: Any = setting(EntropySettings(), help="Who writes what, by kind.", registry=cascades)
    values: list[float] | None = setting(
        None, help="Values of the kind's swept setting, at least two; null: those of the kind.", ge=0
    )
    draft: Any = setting(
        None,
        help="Length policy with which the small model drafts for the large one's spans, verified without loss; null: no drafts.",
        registry=length_policies,
    )
    cost: str = setting(
        "bytes",
        help="Axis of the picture: bytes or flops of all calls, seconds here, or a GPU (h100) for its predicted time.",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if self.values is not None and len(set(self.values)) < 2:
            problems.append(f"values: a frontier has two different values at least, got {self.values}")
        most = next(one for one in fields(self.by) if one.name == self.by.swept).metadata.get("le")
        if most is not None and any(value > most for value in self.values or ()):
            problems.append(f"values: {self.by.swept} of {self.by.kind} must be <= {most:g}, got {self.values}")
        if self.cost not in COUNTED and gpu_named(self.cost) is None:
            problems.append(
                f"cost: must be one of {', '.join(COUNTED)}, or a GPU: {', '.join(MEMORY_AND_BANDWIDTH)}; got {self.cost!r:.60}"
            )
        if why := self.by.why_no_draft(self.draft):
            problems.append(f"draft: {why}")
        return problems
