"""Input masking: in training, a share of the tokens that a drafter reads is replaced by a mask token. Labels stay.

B = sequences, T = positions
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.losses.random_rows import uniform

OWN_STREAM = 1 << 24
"""Added to a token's seed: no position has it, so that other draws by document and position are independent."""


@dataclass(frozen=True)
class InputMask:
    """Hides each token with the same chance. A drafter learns to continue a text in which some tokens tell it nothing.

    Source: Zhuang et al. 2025, Mask-Enhanced Autoregressive Prediction (MEAP), arXiv 2502.07490, 3.1: the form for pretraining.
    """

    ratio: float
    token: int

    def on(self, batch: DraftBatch) -> DraftBatch:
        """Return the batch as the drafter reads it: rows of the loss must come from the batch itself.

        Which tokens are masked depends only on step, document and position, so neither packing nor a resumed run changes it.
        """
        seed_BT = batch.seed_BT + OWN_STREAM
        masked_BT = uniform(seed_BT.flatten(), 1).view(seed_BT.shape) < self.ratio
        return replace(batch, tokens_BT=torch.where(masked_BT, self.token, batch.tokens_BT))
