"""SpecKV: the target's attention from the prompt's end and from the drafter's continuation orders the keys of each head.

H = heads, G = key-value heads, N = queries, P = tokens before the prompt's last one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.kept import KeyOrder, Of
from drafttrain.eval.long_prompt.look_ahead import Models
from drafttrain.eval.long_prompt.pooling import pooled
from drafttrain.target_model.observed_attention import attention_to


@dataclass
class SpecKVSettings:
    """The keys that the target attends to from the end of the prompt and from the drafter's continuation."""

    look_ahead_tokens: int | None = setting(
        None,
        help="Tokens that the drafter continues the prompt with; null: eval.max_new_tokens; 0: none (SnapKV).",
        ge=0,
    )
    window_tokens: int = setting(32, help="Last tokens of the prompt, which attend too and are always kept.", ge=1)
    pool_tokens: int = setting(7, help="A key has the score of the best one among so many around it; 1: its own.", ge=1)

    of: ClassVar[Of] = "keys"

    @property
    def reads_drafter(self) -> bool:
        """Whether the order depends on the drafter."""
        return self.look_ahead_tokens != 0

    @property
    def num_kept_first(self) -> int:
        """Last tokens of a prompt that are kept whatever the scores are, the very last one included."""
        return self.window_tokens + 1


@prompt_choices.register("speckv", SpecKVSettings)
class SpecKV:
    """The largest weight over queries and over the query heads of a group, max-pooled along the prompt.

    Source: Galim et al. 2025, Draft-based Approximate Inference for LLMs, arXiv 2506.08373, SpecKV, without its sparse prefill. Without
        look-ahead it is SnapKV, Li et al. 2024, arXiv 2404.14469, with the largest in place of the mean weight.
    """

    def __init__(self, settings: SpecKVSettings | None = None) -> None:
        self.settings = settings or SpecKVSettings()

    def order(self, prompt: Prompt, models: Models) -> KeyOrder:
        """Return the order of the keys of each head."""
        cached = len(prompt.tokens) - 1
        window = min(self.settings.window_tokens, cached)
        ahead = models.look_ahead(prompt.tokens, self.settings.look_ahead_tokens)
        read = [*prompt.tokens[cached - window :], *ahead]
        largest_LHP = attention_to(models.target, read, after=cached - window, summary=lambda weights: weights.amax(1))
        heads = models.target.cache.heads
        return KeyOrder([self._order(weight_HP, g, window) for weight_HP, g in zip(largest_LHP, heads, strict=True)])

    def _order(self, weight_HP: Tensor, groups: int, window: int) -> Tensor:
        """Return order_GP: the window from its end on, then the other tokens by their scores."""
        score_GP = weight_HP.unflatten(0, (groups, -1)).amax(1)
        cached = score_GP.shape[1]
        before_GP = pooled(score_GP[:, : cached - window], self.settings.pool_tokens)
        best_GP = before_GP.argsort(dim=1, descending=True, stable=True)
        window_GW = torch.arange(cached - 1, cached - window - 1, -1, device=best_GP.device).expand(groups, -1)
        return torch.cat([window_GW, best_GP], dim=1)
