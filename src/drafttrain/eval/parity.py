"""Greedy parity: whether outputs equal the target's own, token for token; where they differ, and how close the choice was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from drafttrain.core.generations import Generation
from drafttrain.target_model import Target

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Logit gaps below which two tokens are tied at this precision, relative to the largest logit."""


@dataclass(frozen=True)
class Divergence:
    """The first difference of one output."""

    id: str
    position: int
    """New tokens before it."""
    plain_token: int
    drafted_token: int
    logit_gap: float
    """The target's logit of the plain token minus that of the other one, after the same text."""
    near_tie: bool
    """The gap is within the rounding of the target's precision."""


@dataclass(frozen=True)
class Parity:
    """How many outputs of all prompts are equal, and where the others differ."""

    exact: bool
    """All outputs are equal, token for token."""
    num_prompts: int
    num_equal: int
    divergences: Sequence[Divergence]
    text: str
    """Summary in one line."""

    def __str__(self) -> str:
        return self.text

    def short(self) -> str:
        """Return the share of equal outputs for a table cell, and whether the others are near ties."""
        share = f"{self.num_equal}/{self.num_prompts}"
        return f"exact {share}" if self.exact else f"{share}, {_cause(self.divergences)}"

    def json(self) -> dict[str, Any]:
        """Return the content as JSON files hold it."""
        return asdict(self)


def parity(plain: Sequence[Generation], drafted: Sequence[Generation], target: Target) -> Parity:
    """Compare greedy outputs with the target's own, prompt by prompt."""
    found = [
        divergence
        for ours, theirs in zip(drafted, plain, strict=True)
        if (divergence := _first_difference(theirs, ours, target)) is not None
    ]
    equal = len(plain) - len(found)
    return Parity(not found, len(plain), equal, found, _in_words(len(plain), found))


def _cause(divergences: Sequence[Divergence]) -> str:
    return "near ties" if all(one.near_tie for one in divergences) else "NOT LOSSLESS"


def _in_words(num_prompts: int, divergences: Sequence[Divergence]) -> str:
    equal = num_prompts - len(divergences)
    if not divergences:
        return f"exact: {equal} of {num_prompts} outputs equal, token for token"
    worst = max(divergences, key=lambda one: abs(one.logit_gap))
    return (
        f"{equal} of {num_prompts} outputs equal; {_cause(divergences)}: largest logit gap {worst.logit_gap:.2g} "
        f"at token {worst.position} of {worst.id}"
    )


@torch.no_grad()
def _first_difference(plain: Generation, drafted: Generation, target: Target) -> Divergence | None:
    assert plain.id == drafted.id
    if list(plain.tokens) == list(drafted.tokens):
        return None
    pairs = zip(plain.tokens, drafted.tokens, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain.tokens), len(drafted.tokens)))
    if position >= len(plain.tokens) or position >= len(drafted.tokens):
        return Divergence(plain.id, position, -1, -1, float("inf"), False)
    text = [*plain.prompt_tokens, *plain.tokens[:position]]
    logits_V = target.model(torch.tensor([text], device=target.device)).logits[0, -1]
    ours, theirs = plain.tokens[position], drafted.tokens[position]
    gap = float(logits_V[ours] - logits_V[theirs])
    tolerance = TOLERANCE[target.model.dtype] * float(logits_V.abs().max())
    return Divergence(plain.id, position, ours, theirs, gap, abs(gap) <= tolerance)
