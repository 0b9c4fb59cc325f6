"""A distribution with known probabilities for some tokens only: each of these is an event, all other tokens together are one.

N = rows, V = vocabulary, K = known tokens, E = events: the known tokens and the tail
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.target_rows import NamedRows

NONE = -69.0
"""Log-probability that stands for 0 (1e-30), so that logarithms stay finite."""


def in_buckets(rows: LossRows, named: NamedRows) -> LossRows:
    """Return the rows over the known events, for any loss.

    Both distributions are summed over the tail, so a loss does not see how the drafter divides it. A distance is a lower bound of
    the one over the whole vocabulary, and at most the tails' mass below it.
    """
    log_q_NV = rows.log_q_NV
    size = log_q_NV.shape[1]
    known_NK = (named.ids_NK >= 0) & (named.ids_NK < size)
    ids_NK = named.ids_NK.clamp(0, size - 1)
    log_q_NK = log_q_NV.gather(1, ids_NK).masked_fill(~known_NK, NONE)
    log_p_NK = named.log_probs_NK.masked_fill(~known_NK, NONE).clamp_min(NONE)
    # Unknown places hold id 0; they go to an extra column, so that token 0 is not taken for known.
    taken_NV = torch.zeros(len(ids_NK), size + 1, dtype=torch.bool, device=ids_NK.device)
    taken_NV.scatter_(1, torch.where(known_NK, ids_NK, size), True)
    tail_q_N = log_q_NV.masked_fill(taken_NV[:, :size], NONE).logsumexp(dim=-1)
    tail_p_N = (1 - log_p_NK.double().exp().sum(dim=-1)).clamp_min(1e-30).log().to(log_p_NK.dtype)
    is_label_NK = (ids_NK == rows.tokens_N[:, None]) & known_NK
    labels_N = torch.where(is_label_NK.any(dim=1), is_label_NK.int().argmax(dim=1), ids_NK.shape[1])
    return LossRows(
        drafter_logits_NV=torch.cat([log_q_NK, tail_q_N[:, None]], dim=1),
        target_logits_NV=torch.cat([log_p_NK, tail_p_N[:, None]], dim=1),
        tokens_N=labels_N,
        seed_N=rows.seed_N,
        confidence_N=rows.confidence_N,
    )


def known_acceptance(buckets: LossRows) -> Tensor:
    """Return the acceptance rate on the known tokens: at most the rate over all tokens, and at least that minus the tails' overlap."""
    log_p_NK, log_q_NK = buckets.log_p_NV[:, :-1], buckets.log_q_NV[:, :-1]
    return torch.minimum(log_p_NK, log_q_NK).exp().sum(dim=-1)
