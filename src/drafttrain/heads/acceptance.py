"""The acceptance head: the chance that a draft token will be kept, from the drafter's last hidden state at the token.

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
    """Predicts whether a draft token will be kept; a length policy stops drafting by it."""

    drafter: str = setting(
        "builtin:drafter", help="Folder or hub id of the frozen drafter that it reads, or recipe:NAME, made first."
    )
    num_blocks: int = setting(3, help="Residual blocks, each with weights of its own.", ge=0)
    rms_norm: bool = setting(
        False,
        help="Scale each state to a root mean square of 1 first: for drafters that hand out states before their norm (EAGLE).",
    )
    reject_weight: float = setting(6.0, help="Weight of the part of a label that says reject.", gt=0)
    prior_correct: bool = setting(
        True, help="Take the bias that reject_weight brings out of the predicted chance again; false: as published."
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
    """Residual blocks and one output, trained by cross-entropy with soft labels in which rejection weighs `reject_weight`.

    Two outputs under a softmax, as published, are one output under a sigmoid: only their difference counts.

    Source: Huang et al. 2024, SpecDec++, arXiv 2405.19715, 3.2. There one block is applied `num_blocks` times over (in the
    published code); here each has its own weights.
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
        """Return the chance of acceptance, its bias taken out where the settings say so."""
        biased_N = self(features_ND).float().sigmoid()
        return prior_corrected(biased_N, self.settings.reject_weight) if self.settings.prior_correct else biased_N

    def uncorrected(self, features_ND: Tensor) -> Tensor | None:
        """Return the chance as it was trained, biased towards rejection."""
        return self(features_ND).sigmoid() if self.settings.prior_correct else None


def prior_corrected(biased_N: Tensor, reject_weight: float) -> Tensor:
    """Return a = w s / (1 - s + w s): the chance a whose weighted cross-entropy is least at s = a / (a + w (1 - a))."""
    return reject_weight * biased_N / (1 - biased_N + reject_weight * biased_N)
