"""The judge decides from the target's state whether a draft token is good enough, although the target prefers another.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from drafttrain.core.settings import setting
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import HeadSettings, TokenHead, heads, probabilities


@dataclass
class JudgeSettings(HeadSettings):
    """Predicts whether a rejected draft token would change the answer. LOSSY where its rule is used."""

    drafter: str = setting(
        help="Frozen drafter whose tokens are judged: folder, hub id, or recipe:NAME, which is trained first."
    )
    layer: int = setting(
        -1,
        help="State of the target that is read: i: the input of block i; -1: after the last block, before the final norm.",
    )
    width: int = setting(0, help="Hidden width of a two-layer network; 0: linear.", ge=0)
    error_weight: float = setting(1.0, help="Weight of tokens that must be rejected; the others have weight 1.", gt=0)
    focal_gamma: float = setting(
        0.0,
        help="Exponent of the focal loss: rows that the judge is sure of count less; 0: weighted cross-entropy.",
        ge=0,
    )
    recall: float = setting(
        0.95,
        help="Share of the held-out tokens with label 0 that the threshold must reject.",
        gt=0,
        le=1,
    )


@heads.register("judge", JudgeSettings)
class JudgeHead(TokenHead):
    """A linear probe with D + 1 parameters, or a two-layer network; trained by weighted cross-entropy or focal loss.

    Source: Bachmann et al. 2025, Judge Decoding, arXiv 2501.19309, 4; focal loss: Lin et al. 2017, arXiv 1708.02002, 3.2.
    """

    kind = "judge"
    settings: JudgeSettings
    delta: Tensor

    def __init__(self, settings: JudgeSettings, hidden_size: int) -> None:
        super().__init__(settings, hidden_size)
        width = settings.width
        self.inner = nn.Linear(hidden_size, width) if width else None
        self.output = nn.Linear(width or hidden_size, 1)
        self.register_buffer("delta", torch.tensor(0.5))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return the logit of each row."""
        states_ND = features_ND.to(self.output.weight.dtype)
        if self.inner is not None:
            states_ND = silu(self.inner(states_ND))
        scores_N1: Tensor = self.output(states_ND)
        return scores_N1[:, 0].float()

    def loss(self, scores_N: Tensor, labels_N: Tensor) -> Tensor:
        """Return -w_t (1 - p_t)^gamma log p_t; p_t is the probability given to the label, w_t the weight of its class."""
        gamma = self.settings.focal_gamma
        accepted_N, rejected_N = logsigmoid(scores_N), logsigmoid(-scores_N)
        of_accepted_N = -((gamma * rejected_N).exp() * accepted_N)
        of_rejected_N = -((gamma * accepted_N).exp() * rejected_N)
        return labels_N * of_accepted_N + self.settings.error_weight * (1 - labels_N) * of_rejected_N

    def weights(self, labels_N: Tensor) -> Tensor:
        """Return the weight of each row's class."""
        return labels_N + self.settings.error_weight * (1 - labels_N)

    def finish(self, held_out: HeadRows) -> None:
        """Choose the threshold on held-out tokens."""
        self.delta.fill_(
            threshold_of_recall(probabilities(self, held_out), held_out.labels_N, recall=self.settings.recall)
        )


def threshold_of_recall(predicted_N: Tensor, labels_N: Tensor, *, recall: float) -> float:
    """Return the lowest threshold that rejects this share of the tokens with label 0.

    It is halfway between the last token that must be rejected and the next prediction above it.
    """
    matter_N = predicted_N[labels_N < 0.5].sort().values
    if not len(matter_N):
        return 0.5
    last = float(matter_N[math.ceil(recall * len(matter_N)) - 1])
    above_N = predicted_N[predicted_N > last]
    return (last + (float(above_N.min()) if len(above_N) else 1.0)) / 2
