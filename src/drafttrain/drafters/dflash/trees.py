"""Trees of a block: level d holds the best tokens of the slot that predicts d places ahead, under every node of the level before.

S = sequences, K = draft tokens of a block, R = tokens that can be drafted, D = hidden, W = most children of a node
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.dynamic_tree import DynamicTree


def slot_trees(
    contexts: Sequence[Context],
    budgets: Sequence[Budget],
    logits_SKR: Tensor,
    states_SKD: Tensor,
    *,
    vocabulary: DraftVocabulary,
    more: Callable[[DraftStep], bool | More],
) -> list[Proposal]:
    """Return the tree of each sequence. The device is read once for all.

    The tree depends on the slots' distributions and the committed text only, and its nodes are FIXED: decoding stays lossless.

    Source: JetSpec, arXiv 2606.18394.
    """
    wide = torch.promote_types(logits_SKR.dtype, torch.float32)
    width = min(max(budget.width for budget in budgets), logits_SKR.shape[-1])
    best = logits_SKR.log_softmax(dim=-1, dtype=wide).topk(width, dim=-1)
    # float64 holds scores and ids exactly.
    scores, places = torch.stack([best.values.double(), best.indices.double()]).tolist()
    made = []
    for number, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
        tree = DynamicTree(context.tokens[-1], budget)
        for place in range(logits_SKR.shape[1]):
            if not tree.frontier:
                break
            step = (number, place + 1, logits_SKR[number, place], states_SKD[number, place])
            expand = [bool(more(DraftStep(*step, token=tree.tokens[node]))) for node in tree.frontier]
            # All nodes of a level have the same distribution.
            ids = vocabulary.ids([int(one) for one in places[number][place]])
            tree.add_level([ids] * len(expand), [scores[number][place]] * len(expand), expand)
        made.append(tree.proposal())
    return made
