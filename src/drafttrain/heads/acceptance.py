"""The acceptance head predicts whether a draft token will be accepted, from the drafter's last hidden state at the token.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import logsigmoid, rms_norm, silu

from drafttrain.core.settings import setting
from drafttrain.heads.token_head import HeadSettings, TokenHead, heads


@dataclass
class AcceptanceSettings(HeadSettings):
    """Predicts whether a draft token will be accepted; length policies use it to stop drafting."""

    drafter: str = setting(
        "builtin:drafter",
        help="Frozen drafter whose states are read: folder, hub id, or recipe:NAME, which is trained first.",
    )
    num_blocks: int = setting(3, help="Number of residual blocks, each with its own weights.", ge=0)
    rms_norm: bool = setting(
        False,
        help="Scale each state to a root mean square of 1 first, for drafters whose states are read before their norm (EAGLE).",
    )
    reject_weight: float = setting(6.0, help="Weight of the rejected part of a label.", gt=0)
    prior_correct: bool = setting(
        True, help="Remove the bias of reject_weight from the predictions; false: as published."
    )


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, states_ND: Tensor) -> Tensor:
        return states_ND + silu(self.linear(states_ND))


@heads.register("acceptance", AcceptanceSettings)
class AcceptanceHead(TokenHead):
    """Residual blocks and one output, trained by cross-entropy on soft labels; rejection has the weight `reject_weight`.

    The published head has two outputs under a softmax. Only their difference counts, so one output under a sigmoid is the
    same.

    Source: Huang et al. 2024, SpecDec++, arXiv 2405.19715, 3.2. The published code applies one block `num_blocks` times;
    here each block has its own weights.
    """

    kind = "acceptance"
    settings: AcceptanceSettings

    def __init__(self, settings: AcceptanceSettings, hidden_size: int) -> None:
        super().__init__(settings, hidden_size)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(settings.num_blocks))
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return the logit of each row; biased towards rejection by `reject_weight`."""
        states_ND = features_ND.to(self.output.weight.dtype)
        if self.settings.rms_norm:
            states_ND = rms_norm(states_ND, states_ND.shape[-1:], eps=1e-6)
        for block in self.blocks:
            states_ND = block(states_ND)
        scores_N1: Tensor = self.output(states_ND)
        return scores_N1[:, 0].float()

    def loss(self, scores_N: Tensor, labels_N: Tensor) -> Tensor:
        """Return w (1 - a) (-log (1 - s)) + a (-log s), s the sigmoid of the score."""
        rejected_N = self.settings.reject_weight * (1 - labels_N)
        return -rejected_N * logsigmoid(-scores_N) - labels_N * logsigmoid(scores_N)

    def weights(self, labels_N: Tensor) -> Tensor:
        """Return w (1 - a) + a."""
        return self.settings.reject_weight * (1 - labels_N) + labels_N

    def probability(self, features_ND: Tensor) -> Tensor:
        """Return the probability of acceptance, without the bias of `reject_weight` if `prior_correct` is set."""
        biased_N = self(features_ND).float().sigmoid()
        return prior_corrected(biased_N, self.settings.reject_weight) if self.settings.prior_correct else biased_N

    def uncorrected(self, features_ND: Tensor) -> Tensor | None:
        """Return the probability with the bias of `reject_weight`; None where `prior_correct` is off."""
        return self(features_ND).sigmoid() if self.settings.prior_correct else None


def prior_corrected(biased_N: Tensor, reject_weight: float) -> Tensor:
    """Return a = w s / (1 - s + w s): the inverse of s = a / (a + w (1 - a)), which minimizes the weighted cross-entropy."""
    return reject_weight * biased_N / (1 - biased_N + reject_weight * biased_N)
