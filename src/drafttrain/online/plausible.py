"""Was this answer written by this target? What somebody else wrote is in the log of no server, or the log was tampered with.

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
    """Return how much less likely each answer is than the target's own draws, in standard deviations.

    The negative log-likelihood of a text that the target draws at temperature 1 is the sum of its entropies, and its variance the
    sum of theirs; at lower temperatures, and cut to a nucleus, it is less. So a text of the target's is seldom above 3.
    """
    found: list[float] = []
    for start in range(0, len(records), RECORDS_AT_ONCE):
        found += [_surprise(target, record) for record in records[start : start + RECORDS_AT_ONCE]]
    return found


def _surprise(target: Target, record: Record) -> float:
    batch, _ = pack([record], width=len(record.tokens), weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    label_N = batch.loss_mask_BT[0].nonzero()[:, 0]
    label_N = label_N[label_N > 0].to(target.device)
    logits_NV = without_padding(target.rows_of(seen).at(label_N - 1), num_tokens=target.num_tokens)
    log_p_NV = logits_NV.double().log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    information_NV = -log_p_NV.masked_fill(p_NV == 0, 0.0)
    entropy_N = (p_NV * information_NV).sum(-1)
    variance_N = (p_NV * (information_NV - entropy_N[:, None]) ** 2).sum(-1)
    tokens_N = batch.tokens_BT[0].to(target.device)[label_N]
    said_N = -log_p_NV.gather(1, tokens_N[:, None])[:, 0]
    # One nat squared: a law that is all but certain has no variance to be measured against.
    return float((said_N - entropy_N).sum() / (variance_N.sum() + 1.0).sqrt())
