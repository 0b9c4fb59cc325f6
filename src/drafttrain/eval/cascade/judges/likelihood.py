"""A judge that asks nothing: how likely the large model finds what the small one wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from drafttrain.core.settings import setting
from drafttrain.eval.cascade import span_judges
from drafttrain.eval.cascade.judges import HIGHEST
from drafttrain.eval.cascade.spans import Written
from drafttrain.eval.cascade.text_reader import TextReader


@dataclass
class LikelihoodSettings:
    """Score a step by the large model's probabilities of its tokens."""

    of: Literal["mean", "least"] = setting(
        "mean", help="Of the tokens' probabilities: their geometric mean, or the least. The score is 9 times that."
    )


@span_judges.register("likelihood", LikelihoodSettings)
class Likelihood:
    """For models that were not taught to score. One call reads the step, which the large model reads anyway.

    A stand-in for the digit of SpecReason, and this project's choice.
    """

    def __init__(self, settings: LikelihoodSettings, tokenizer: Any) -> None:
        self.settings = settings

    def score(self, written: Written, large: TextReader) -> float:
        """Return 9 times the mean, or least, probability."""
        log_probs_NV = large.of_tokens(written.start).log_probs_at_one()
        tokens_N = torch.tensor(list(written.tokens), device=log_probs_NV.device)
        chosen_N = log_probs_NV.gather(1, tokens_N[:, None])[:, 0]
        found = chosen_N.mean() if self.settings.of == "mean" else chosen_N.min()
        return HIGHEST * float(found.exp())
