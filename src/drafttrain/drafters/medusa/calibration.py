"""How often each guess of each Medusa head is right on held-out text, and the tree that follows from it.

V = tokens that a head can draft, D = hidden, K = heads, R = ranks of a head's guesses, N = rows
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput, Head
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.medusa.static_tree import best_paths, non_increasing
from drafttrain.losses.align import align

TREE_NODES = 256
CALIBRATED_RANKS = 10
ROWS_AT_ONCE = 2048


def calibrated_tree(
    drafts: Iterable[tuple[DraftBatch, DraftOutput]], head: Head, *, num_heads: int, vocabulary: DraftVocabulary
) -> dict[str, Any]:
    """Return the table of accuracies by head and rank, and the best tree for it, as `medusa_tree.json` stores them.

    Args:
        drafts: Batches of held-out text, each with the states of all heads.
        vocabulary: Of all heads. A label that they cannot draft counts as a miss of every guess.
    """
    hits_KR = torch.zeros(num_heads, min(CALIBRATED_RANKS, len(vocabulary.ids_R)), dtype=torch.long)
    counts_K = torch.zeros(num_heads, dtype=torch.long)
    for batch, drafted in drafts:
        for depth, states_ND, labels_N in _rows(batch, drafted):
            guesses_NR = vocabulary.best(head(states_ND, depth), count=hits_KR.shape[1])
            hits_KR[depth - 1] += (guesses_NR == labels_N[:, None]).sum(0).cpu()
            counts_K[depth - 1] += len(labels_N)
    accuracy_KR = (hits_KR / counts_K.clamp_min(1)[:, None]).tolist()
    return {
        "num_positions": counts_K.tolist(),
        "accuracy": accuracy_KR,
        "paths": best_paths([non_increasing(row) for row in accuracy_KR], TREE_NODES),
    }


def _rows(batch: DraftBatch, drafted: DraftOutput) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (depth, states_ND, labels_N) of the batch's rows, a few thousand at a time."""
    rows = align(drafted, batch)
    first = 0
    for depth, count in rows.counts.items():
        states_ND = drafted.states_BTD[depth].flatten(0, 1)
        for begin in range(first, first + count, ROWS_AT_ONCE):
            chosen = slice(begin, min(begin + ROWS_AT_ONCE, first + count))
            yield depth, states_ND[rows.drafter_N[chosen]], rows.tokens_N[chosen]
        first += count
