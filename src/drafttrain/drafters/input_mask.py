"""Input masking: in training, a share of the tokens that a drafter reads is replaced by a mask token. Labels stay.

B = sequences, T = positions
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.drafters.mask_token import unused_token
from drafttrain.losses.random_rows import uniform
from drafttrain.target_model import Target
from drafttrain.target_model.end_tokens import end_ids
from drafttrain.target_model.tokenizer import num_ids

OWN_STREAM = 1 << 24
"""Added to a token's seed: no position has it, so that other draws by document and position are independent."""


class MaskSettings(Protocol):
    """What a kind that masks its input has among its settings."""

    input_mask_ratio: float
    mask_token_id: int | None


@dataclass(frozen=True)
class InputMask:
    """Hides each token with the same chance. A drafter learns to continue a text in which some tokens tell it nothing.

    Source: Zhuang et al. 2025, Mask-Enhanced Autoregressive Prediction (MEAP), arXiv 2502.07490, 3.1: the form for pretraining.
    """

    ratio: float
    token: int

    @classmethod
    def of(cls, model: Any, settings: MaskSettings, *, target: Target | None, tokenizer: Any) -> Self:
        """Return the mask of these settings, for a model that reads the ids of this tokenizer.

        Raises:
            CheckpointError: The mask token has no row in its embedding, or no id is free.
        """
        token = unused_token(
            tokenizer,
            settings.mask_token_id,
            num_rows=int(model.get_input_embeddings().weight.shape[0]),
            num_tokens=num_ids(tokenizer) if target is None else target.num_tokens,
            ends=end_ids(None, tokenizer) if target is None else target.eos_token_ids,
            of="this drafter",
        )
        return cls(settings.input_mask_ratio, token)

    def on(self, batch: DraftBatch) -> DraftBatch:
        """Return the batch as the drafter reads it: rows of the loss must come from the batch itself.

        Which tokens are masked depends only on step, document and position, so neither packing nor a resumed run changes it.
        """
        seed_BT = batch.seed_BT + OWN_STREAM
        masked_BT = uniform(seed_BT.flatten(), 1).view(seed_BT.shape) < self.ratio
        return replace(batch, tokens_BT=torch.where(masked_BT, self.token, batch.tokens_BT))
