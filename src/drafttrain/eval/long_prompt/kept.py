"""What the target keeps of a prompt: the best keys of every head, or the best tokens; and how it then reads the prompt.

The last token of a prompt is always kept: the next call reads it. L = layers, G = key-value heads, P = tokens before the last one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Prompt
from drafttrain.target_model.cached_lm import CachedLM

Of = Literal["keys", "tokens"]
"""keys: the target reads the whole prompt and keeps some keys of each head. tokens: it reads some tokens only."""
Positions = Literal["kept", "renumbered"]
"""Of tokens: where they are in the prompt, or 0, 1, 2, ..."""


@dataclass(frozen=True)
class Amount:
    """How much of a prompt is kept: a number of tokens, or a share."""

    tokens: int | None = None
    share: float | None = None

    def of(self, num_tokens: int) -> int:
        """Return the tokens that are kept of a prompt of this length; the last one at least."""
        wanted = self.tokens if self.share is None else round(self.share * num_tokens)
        return max(1, min(num_tokens, wanted or 0))

    def __str__(self) -> str:
        return f"{self.tokens}" if self.share is None else f"{self.share:.0%}"


@dataclass(frozen=True)
class KeyOrder:
    """An order of the cached tokens for each head."""

    order_LGP: Sequence[Tensor]

    def kept(self, count: int) -> list[Tensor]:
        """Return columns_GW by layer: the first of each order that leave `count` tokens with the prompt's last one, ascending."""
        return [order_GP[:, : count - 1].sort(dim=-1).values for order_GP in self.order_LGP]

    def kept_mass(self, mass_LGP: Sequence[Tensor], count: int) -> float:
        """Return how much of the attention to the cached tokens is to those kept."""
        pairs = zip(mass_LGP, self.kept(count), strict=True)
        return sum(float(mass_GP.gather(1, kept_GW).sum()) for mass_GP, kept_GW in pairs)

    def prefill(self, lm: CachedLM, prompt: Prompt, count: int, needs: TargetNeeds) -> list[TargetOutput]:
        """Read a prompt without its last token, and keep its best keys."""
        seen = lm.begin([prompt.tokens[:-1]], needs=needs)
        if count < len(prompt.tokens):
            lm.reduce([[columns_GW] for columns_GW in self.kept(count)])
        return seen


@dataclass(frozen=True)
class TokenOrder:
    """An order of the tokens, the same for all heads."""

    order_P: Sequence[int]
    positions: Positions = "kept"

    def kept(self, count: int) -> list[int]:
        """Return the first of the order that leave `count` tokens with the prompt's last one, ascending."""
        return sorted(self.order_P[: count - 1])

    def kept_mass(self, mass_LGP: Sequence[Tensor], count: int) -> float:
        """Return how much of the attention to the cached tokens is to those kept."""
        kept_W = torch.tensor(self.kept(count), dtype=torch.long)
        return sum(float(mass_GP[:, kept_W.to(mass_GP.device)].sum()) for mass_GP in mass_LGP)

    def prefill(self, lm: CachedLM, prompt: Prompt, count: int, needs: TargetNeeds) -> list[TargetOutput]:
        """Read the best tokens of a prompt without its last one.

        Raises:
            CheckpointError: States are read of tokens that are left out.
        """
        if needs.hidden or needs.final:
            raise CheckpointError(
                "reduced prompts of tokens have no states at the tokens left out, and this proposer reads states of the target: "
                "keep keys (speckv), or draft with a language model"
            )
        kept = self.kept(count)
        places = [[*kept, len(prompt.tokens) - 1]] if self.positions == "kept" else None
        return lm.begin([[prompt.tokens[place] for place in kept]], needs=needs, positions=places)


Order = KeyOrder | TokenOrder


@dataclass(frozen=True)
class KeptPrompts:
    """How an engine reads prompts, one at a time: it keeps of each what its order says. LOSSY."""

    orders: Mapping[str, Order]
    """By id of the prompt."""
    amount: Amount

    def __call__(self, lm: CachedLM, prompts: Sequence[Prompt], needs: TargetNeeds) -> list[TargetOutput]:
        """Read a prompt without its last token.

        Raises:
            CheckpointError: There are several prompts, or the order of one cannot be read with these needs.
        """
        if len(prompts) > 1:
            raise CheckpointError(
                f"reduced prompts are read one at a time: give generate one prompt, got {len(prompts)}"
            )
        (prompt,) = prompts
        return self.orders[prompt.id].prefill(lm, prompt, self.amount.of(len(prompt.tokens)), needs)
