"""From logits to what the losses are written in.

N = rows, V = vocabulary
"""

import torch
from torch import Tensor

from drafttrain.core.records import LossRows


def log_laws(rows: LossRows) -> tuple[Tensor, Tensor]:
    """Return (log p, log q), float32 or wider, of shape NV; the target's carries no gradient."""
    assert rows.target_logits_NV is not None, "the loss says needs_target, so its rows have the target's"
    return (
        torch.log_softmax(_wide(rows.target_logits_NV).detach(), dim=-1),
        torch.log_softmax(_wide(rows.drafter_logits_NV), dim=-1),
    )


def kl_divergence(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return KL(a || b) by row; tokens without mass in `a` add nothing."""
    terms_NV = log_a_NV.exp() * (log_a_NV - log_b_NV)
    return terms_NV.masked_fill(log_a_NV == -torch.inf, 0.0).sum(dim=-1)


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
