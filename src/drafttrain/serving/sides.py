"""The two sides of a comparison, an engine and the evaluator: what each decoded, and its counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drafttrain.serving.engines import DecodedPrompt


@dataclass(frozen=True)
class Side:
    """What one side decoded, prompt by prompt."""

    plain: Sequence[DecodedPrompt]
    """Greedily, by the target alone."""
    greedy: Sequence[DecodedPrompt]
    sampled: Sequence[DecodedPrompt] = ()
    """Empty: no sampled run was asked for."""


@dataclass(frozen=True)
class Counts:
    """Sums of the counters over prompts, named as vLLM names them."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]

    @property
    def block_efficiency(self) -> float:
        """1 + accepted / drafts, the engine's mean acceptance length; nan if nothing was drafted."""
        return 1 + self.num_accepted / self.num_drafts if self.num_drafts else float("nan")

    def json(self) -> dict[str, Any]:
        """Return what engine.json holds."""
        return asdict(self) | {"block_efficiency": self.block_efficiency}


def sum_counts(decoded: Sequence[DecodedPrompt], num_draft_tokens: int) -> Counts:
    """Return the sums over prompts, with as many positions as a round has draft tokens."""
    return Counts(
        num_drafts=sum(one.num_drafts for one in decoded),
        num_draft_tokens=sum(one.num_draft_tokens for one in decoded),
        num_accepted=sum(one.num_accepted for one in decoded),
        accepted_at=tuple(
            sum(one.accepted_at[i] for one in decoded if i < len(one.accepted_at)) for i in range(num_draft_tokens)
        ),
    )
