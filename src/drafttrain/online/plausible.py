"""Tests whether the target wrote an answer: one written by anything else means a wrong or forged log.

N = answered tokens, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drafttrain.core.probability import without_padding
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.target_model import Target

RECORDS_AT_ONCE = 8


@torch.no_grad()
def surprise(target: Target, records: Sequence[Record]) -> list[float]:
    """Return how much less likely each answer is than samples of the target, in standard deviations.

    For a text sampled at temperature 1, the expected negative log-likelihood is the sum of the entropies of its positions, and the
    variance is the sum of their variances. Lower temperatures and nucleus sampling give less. So the target's own text is seldom above 3.
    """
    found: list[float] = []
    for start in range(0, len(records), RECORDS_AT_ONCE):
        found += [_surprise(target, record) for record in records[start : start + RECORDS_AT_ONCE]]
    return found


def _surprise(target: Target, record: Record) -> float:
    batch, _ = pack([record], width=len(record.tokens), weight_of_step=1.0)
    output = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    label_N = batch.loss_mask_BT[0].nonzero()[:, 0]
    label_N = label_N[label_N > 0].to(target.device)
    logits_NV = without_padding(target.rows_of(output).at(label_N - 1), num_tokens=target.num_tokens)
    log_p_NV = logits_NV.double().log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    information_NV = -log_p_NV.masked_fill(p_NV == 0, 0.0)
    entropy_N = (p_NV * information_NV).sum(-1)
    variance_N = (p_NV * (information_NV - entropy_N[:, None]) ** 2).sum(-1)
    tokens_N = batch.tokens_BT[0].to(target.device)[label_N]
    nats_N = -log_p_NV.gather(1, tokens_N[:, None])[:, 0]
    # The 1.0 is in nats squared: a distribution that is almost certain has no variance to compare with.
    return float((nats_N - entropy_N).sum() / (variance_N.sum() + 1.0).sqrt())
