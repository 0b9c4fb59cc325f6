"""What a choice may read: the target after the prompt, and the drafter's language model, which looks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.decoding import continued
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM


@dataclass(frozen=True)
class Models:
    """The target, which has read the prompt without its last token, and the drafter's language model."""

    target: CachedLM
    drafter: CachedLM
    num_tokens: int
    """Ids that the tokenizer can produce."""
    ends: Sequence[int]
    """Tokens that end a text."""
    seed: int
    look_ahead_tokens: int
    """Where a choice gives no number of its own."""

    @classmethod
    def of(cls, target: Target, language_model: Any, *, seed: int, look_ahead_tokens: int) -> Models:
        """Return the models of an evaluation."""
        return cls(
            CachedLM(target.model, name="target"),
            CachedLM(language_model, name="drafter"),
            target.num_tokens,
            target.eos_token_ids,
            seed,
            look_ahead_tokens,
        )

    def look_ahead(self, tokens: Sequence[int], count: int | None) -> list[int]:
        """Return the drafter's greedy text after a prompt: `count` tokens, fewer where it ends."""
        count = self.look_ahead_tokens if count is None else count
        if not count:
            return []
        (text,) = continued(
            [tokens],
            [self.drafter],
            num_tokens=self.num_tokens,
            ends=self.ends,
            sampling=Sampling(0.0),
            limits=[count],
            numbers_BT=torch.zeros(1, count, dtype=torch.float64),
        )
        return text
