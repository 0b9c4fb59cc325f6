"""A batch of the target's texts in a drafter's own tokens, and where both have read the same text.

B = rows, T = positions of the target, S = positions of the drafter
"""

from __future__ import annotations

import torch

from drafttrain.core.batches import DraftBatch, OwnText, PackedDocuments
from drafttrain.target_model.other_tokenizer import OtherTokenizer, Reading


def own_text(batch: DraftBatch, other: OtherTokenizer) -> OwnText:
    """Return the documents of a batch in the drafter's tokens, in the same rows and order.

    A position of the target has a state of the drafter if the text up to its end is spelled by whole own tokens: the state after the
    last of them. On a GPU the host waits: call it before the batch is sent.
    """
    tokens_BT, documents_BT = batch.tokens_BT.cpu(), batch.documents_BT.cpu()
    rows = [_read(*row, other) for row in zip(tokens_BT.tolist(), documents_BT.tolist(), strict=True)]
    width = max(1, *(sum(len(reading.ids) for _, reading in row) for row in rows))
    tokens_BS = torch.zeros(len(rows), width, dtype=torch.long)
    positions_BS = torch.arange(width).repeat(len(rows), 1)
    slot_BT = torch.full_like(tokens_BT, -1)
    for number, row in enumerate(rows):
        begin = 0
        for place, reading in row:
            end, after_T = begin + len(reading.ids), torch.tensor(reading.after_T)
            tokens_BS[number, begin:end] = torch.tensor(reading.ids)
            positions_BS[number, begin:] = torch.arange(width - begin)
            slots_T = torch.where(after_T > 0, number * width + begin + after_T - 1, -1)
            slot_BT[number, place : place + len(after_T)] = slots_T
            begin = end
        positions_BS[number, begin:] = torch.arange(width - begin)
    own = OwnText(
        tokens_BS, positions_BS, slot_BT.clamp_min(0), slot_BT >= 0, documents=PackedDocuments.of(positions_BS)
    )
    device = batch.tokens_BT.device
    return own.each(lambda tensor: tensor.to(device))


def _read(tokens: list[int], documents: list[int], other: OtherTokenizer) -> list[tuple[int, Reading]]:
    """Return the documents of a row: where each begins, and its text in own tokens."""
    begins = [i for i, number in enumerate(documents) if number >= 0 and (i == 0 or documents[i - 1] != number)]
    ends = [
        next((i for i in range(begin, len(documents)) if documents[i] != documents[begin]), len(documents))
        for begin in begins
    ]
    return [(begin, other.read(tokens[begin:end])) for begin, end in zip(begins, ends, strict=True)]
