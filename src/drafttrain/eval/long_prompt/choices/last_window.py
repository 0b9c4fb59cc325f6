"""A baseline: the first tokens and the last ones, whatever is in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.kept import KeyOrder, Of, Order, Positions, TokenOrder
from drafttrain.eval.long_prompt.look_ahead import Models


@dataclass
class LastWindowSettings:
    """The first tokens and the last ones."""

    of: Of = setting("keys", help="keys: of the whole prompt. tokens: the target reads only these.")
    first_tokens: int = setting(4, help="First tokens of the prompt, which are always kept (attention sinks).", ge=0)
    positions: Positions = setting("renumbered", help="tokens: their positions, renumbered or kept.")

    reads_drafter: ClassVar[bool] = False
    num_kept_first: ClassVar[int] = 0


@prompt_choices.register("last_window", LastWindowSettings)
class LastWindow:
    """Attention sinks and a window.

    Source: Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453; positions are kept for keys.
    """

    def __init__(self, settings: LastWindowSettings | None = None) -> None:
        self.settings = settings or LastWindowSettings()

    def order(self, prompt: Prompt, models: Models) -> Order:
        """Return the first tokens, then the others from the end on."""
        cached = len(prompt.tokens) - 1
        first = min(self.settings.first_tokens, cached)
        order_P = [*range(first), *reversed(range(first, cached))]
        if self.settings.of == "tokens":
            return TokenOrder(order_P, self.settings.positions)
        cache = models.target.cache
        return KeyOrder([torch.tensor(order_P, device=models.target.device).repeat(heads, 1) for heads in cache.heads])
