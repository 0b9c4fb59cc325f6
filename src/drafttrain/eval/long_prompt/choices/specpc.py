"""SpecPC: the drafter's attention from the prompt's end orders the tokens; the target reads the best ones only.

H = heads, N = queries, P = tokens before the prompt's last one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.kept import Of, Positions, TokenOrder
from drafttrain.eval.long_prompt.look_ahead import Models
from drafttrain.eval.long_prompt.pooling import pooled
from drafttrain.target_model.observed_attention import attention_to


@dataclass
class SpecPCSettings:
    """The tokens that the drafter attends to from the end of the prompt."""

    look_ahead_tokens: int = setting(
        0, help="Tokens that the drafter continues the prompt with, and from which it attends too.", ge=0
    )
    window_tokens: int = setting(
        64, help="Last tokens of the prompt, which attend too, later ones with more weight, and are always kept.", ge=2
    )
    pool_tokens: int = setting(64, help="A token has the score of the best one among so many around it.", ge=1)
    neighbours: int = setting(64, help="With a token, as many around it are kept as fit; 0: none.", ge=0)
    first_layer: int | None = setting(
        None,
        help="Layers of the drafter from this one on count: the first ones attend everywhere. null: the second half.",
        ge=0,
    )
    positions: Positions = setting(
        "renumbered", help="Positions of the kept tokens: renumbered, as published, or kept as in the whole prompt."
    )

    of: ClassVar[Of] = "tokens"
    reads_drafter: ClassVar[bool] = True

    @property
    def num_kept_first(self) -> int:
        """Last tokens of a prompt that are kept whatever the scores are, the very last one included."""
        return self.window_tokens


@prompt_choices.register("specpc", SpecPCSettings)
class SpecPC:
    """The largest weight over queries, heads and layers of the drafter, max-pooled along the prompt.

    Source: Galim et al. 2025, Draft-based Approximate Inference for LLMs, arXiv 2506.08373, SpecPC. Positions as in the whole prompt
        are those of Liu et al. 2025, Speculative Prefill, arXiv 2502.02789.
    """

    def __init__(self, settings: SpecPCSettings | None = None) -> None:
        self.settings = settings or SpecPCSettings()

    def order(self, prompt: Prompt, models: Models) -> TokenOrder:
        """Return the order of the tokens: the window from its end on, then each of the best ones with its neighbours."""
        drafter, cached = models.drafter, len(prompt.tokens) - 1
        first = self._first_layer(drafter.model)
        ahead = models.look_ahead(prompt.tokens, self.settings.look_ahead_tokens)
        # The prompt's last token is the last one of the window.
        window = min(self.settings.window_tokens, len(prompt.tokens)) - 1
        drafter.begin([prompt.tokens[:-1]])
        read = [*prompt.tokens[cached - window :], *ahead]
        importance_N1 = torch.cat([torch.linspace(0, 1, window + 1), torch.ones(len(ahead))])[:, None].to(
            drafter.device
        )
        scores_LP = attention_to(
            drafter, read, after=cached - window, summary=lambda weights_HNP: (weights_HNP * importance_N1).amax((0, 1))
        )
        score_P = pooled(torch.stack(scores_LP[first:]).amax(0, keepdim=True), self.settings.pool_tokens)[0]
        best = score_P.argsort(descending=True, stable=True).tolist()
        found = dict.fromkeys(reversed(range(cached - window, cached)))
        for token in best:
            found |= dict.fromkeys(near for near in self._around(token) if 0 <= near < cached)
        return TokenOrder(list(found), self.settings.positions)

    def _around(self, token: int) -> list[int]:
        """Return a token and its neighbours, the nearest first."""
        before = max(0, self.settings.neighbours - 1) // 2
        around = range(token - before, token + max(1, self.settings.neighbours) - before)
        return sorted(around, key=lambda place: (abs(place - token), place))

    def _first_layer(self, model: Any) -> int:
        layers = int(model.config.get_text_config().num_hidden_layers)
        first = layers // 2 if self.settings.first_layer is None else self.settings.first_layer
        if first >= layers:
            raise CheckpointError(f"specpc: first_layer must be 0..{layers - 1} for this drafter, got {first}")
        return first
