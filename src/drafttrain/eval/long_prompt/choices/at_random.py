"""A baseline: keys or tokens at random, besides the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from drafttrain.core.random import stream
from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.kept import KeyOrder, Of, Order, Positions, TokenOrder
from drafttrain.eval.long_prompt.look_ahead import Models


@dataclass
class AtRandomSettings:
    """Keys or tokens at random."""

    of: Of = setting("keys", help="keys: of each head. tokens: the target reads only these.")
    window_tokens: int = setting(32, help="Last tokens of the prompt, which are always kept.", ge=0)
    positions: Positions = setting("renumbered", help="tokens: their positions, renumbered or kept.")

    reads_drafter: ClassVar[bool] = False

    @property
    def num_kept_first(self) -> int:
        """Last tokens of a prompt that are kept in any case, the very last one included."""
        return self.window_tokens + 1


@prompt_choices.register("random", AtRandomSettings)
class AtRandom:
    """Every order of the tokens before the window is equally likely; each head has its own."""

    def __init__(self, settings: AtRandomSettings | None = None) -> None:
        self.settings = settings or AtRandomSettings()

    def order(self, prompt: Prompt, models: Models) -> Order:
        """Return the window from its end on, then the others in random order."""
        cached = len(prompt.tokens) - 1
        before = max(0, cached - self.settings.window_tokens)
        window_W, generator = torch.arange(cached - 1, before - 1, -1), stream(models.seed, "random keys", prompt.id)

        def drawn() -> torch.Tensor:
            return torch.cat([window_W, torch.randperm(before, generator=generator)])

        if self.settings.of == "tokens":
            return TokenOrder(drawn().tolist(), self.settings.positions)
        heads = models.target.cache.heads
        return KeyOrder([torch.stack([drawn() for _ in range(count)]).to(models.target.device) for count in heads])
