"""Greedy parity: whether outputs equal the target's own, token for token; where they differ, whether rounding explains it.

A call of one token and a call of several compute the same logits with different rounding. Where two tokens are nearly tied,
plain decoding and verification may choose differently, and all later text differs. So only the first difference of an output
says anything: the text before it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from drafttrain.core.generations import Generation
from drafttrain.core.images import Image
from drafttrain.target_model import Target

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""What rounding explains: a difference of two logits up to this share of the largest logit, by type of the target."""


@dataclass(frozen=True)
class Divergence:
    """The first difference of one output."""

    id: str
    position: int
    """New tokens before it."""
    plain_token: int
    drafted_token: int
    logit_gap: float
    """Difference of the two tokens' logits after the same text: the larger one of the plain and the verifying path."""
    rounding: float
    """The largest difference that rounding explains here."""
    near_tie: bool
    """Rounding explains the difference."""


@dataclass(frozen=True)
class Parity:
    """How many outputs of all prompts are equal, and where the others differ."""

    exact: bool
    """All outputs are equal, token for token."""
    num_prompts: int
    num_equal: int
    num_near_ties: int
    """Outputs whose first difference is explained by rounding."""
    num_unexplained: int
    """Outputs whose first difference is not: decoding is not lossless."""
    divergences: Sequence[Divergence]
    text: str
    """Summary in one line."""

    def __str__(self) -> str:
        return self.text

    @property
    def lossless(self) -> bool:
        """Whether all outputs are equal, except for differences that rounding explains."""
        return self.num_unexplained == 0

    def short(self) -> str:
        """Return the counts for a table cell."""
        if self.exact:
            return f"exact {self.num_equal}/{self.num_prompts}"
        return (
            f"identical {self.num_equal}/{self.num_prompts}, near ties {self.num_near_ties}/{self.num_prompts}, "
            f"unexplained {self.num_unexplained}"
        )

    def json(self) -> dict[str, Any]:
        """Return the content as JSON files hold it."""
        return asdict(self)


def parity(
    plain: Sequence[Generation],
    drafted: Sequence[Generation],
    target: Target,
    *,
    images: Sequence[Sequence[Image]] | None = None,
) -> Parity:
    """Compare greedy outputs with the target's own, prompt by prompt.

    Args:
        images: Of each prompt; None: of none.
    """
    found = [
        divergence
        for ours, theirs, seen in zip(drafted, plain, images or [()] * len(plain), strict=True)
        if (divergence := _first_difference(theirs, ours, target, seen)) is not None
    ]
    near = sum(one.near_tie for one in found)
    text = _in_words(len(plain), found, str(target.model.dtype).removeprefix("torch."))
    return Parity(not found, len(plain), len(plain) - len(found), near, len(found) - near, found, text)


def _in_words(num_prompts: int, divergences: Sequence[Divergence], dtype: str) -> str:
    equal = num_prompts - len(divergences)
    if not divergences:
        return f"exact: {equal} of {num_prompts} outputs equal, token for token"
    parts = [f"{equal} of {num_prompts} outputs equal"]
    near = [one for one in divergences if one.near_tie]
    unexplained = [one for one in divergences if not one.near_tie]
    if near:
        worst = max(near, key=lambda one: one.logit_gap)
        parts.append(
            f"{len(near)} differ first at a near tie: the two logits are at most {worst.logit_gap:.2g} apart, and "
            f"rounding in {dtype} explains up to {worst.rounding:.2g}"
        )
    if unexplained:
        worst = max(unexplained, key=lambda one: one.logit_gap)
        parts.append(
            f"NOT LOSSLESS: {len(unexplained)} unexplained: at token {worst.position} of {worst.id} the two logits are "
            f"{worst.logit_gap:.2g} apart, and rounding in {dtype} explains up to {worst.rounding:.2g}"
        )
    return "; ".join(parts)


def _first_difference(
    plain: Generation, drafted: Generation, target: Target, images: Sequence[Image]
) -> Divergence | None:
    assert plain.id == drafted.id
    if list(plain.tokens) == list(drafted.tokens):
        return None
    pairs = zip(plain.tokens, drafted.tokens, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain.tokens), len(drafted.tokens)))
    if position >= len(plain.tokens) or position >= len(drafted.tokens):
        return Divergence(plain.id, position, -1, -1, float("inf"), 0.0, False)
    text = list(plain.prompt_tokens), list(plain.tokens[:position])
    # One token a call, as plain decoding reads it; and as many as the call had read that verified this token.
    calls = (1, _read_together(drafted, position, sum(map(len, text))))
    paths = [target.logits_after(*text, together=count, images=images) for count in calls]
    ours, theirs = plain.tokens[position], drafted.tokens[position]
    gap = max(abs(float(logits_V[ours] - logits_V[theirs])) for logits_V in paths)
    rounding = TOLERANCE[target.model.dtype] * max(float(logits_V.abs().max()) for logits_V in paths)
    return Divergence(plain.id, position, ours, theirs, gap, rounding, gap <= rounding)


def _read_together(drafted: Generation, position: int, num_tokens: int) -> int:
    """Return how many tokens of the text before a position the call read that verified it: all, where rounds are not known."""
    start = max((one.start for one in drafted.rounds if one.start <= position), default=None)
    return num_tokens if start is None else position - start + 1
