"""A drafter's own vocabulary: a part of its target's tokens, chosen by how often they are labels; and checks of stored ones.

R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import tensors_named
from drafttrain.target_model import Target

MAPS = ("d2t", "token_map")
"""Tensors of a drafter folder that name its vocabulary: offsets (target id - draft id), or the target's ids."""
SHOWN = 5
SIZE_HELP = "Size of the drafter's vocabulary: the most frequent labels of the data; null: all tokens."


def size_for(target: Target, asked: int | None) -> int:
    """Return the size of a drafter's vocabulary; by default it is the target's.

    Raises:
        CheckpointError: The tokenizer has fewer tokens.
    """
    if asked is not None and asked > target.num_tokens and asked != target.vocab_size:
        raise CheckpointError(f"drafter.draft_vocab_size must be 1..{target.num_tokens} for this target, got {asked}")
    return asked or target.vocab_size


def most_frequent(label_counts: Any, *, size: int, vocab_size: int) -> Tensor:
    """Return ids_R, the most frequent labels in rising order; of labels that are equally frequent, the lower ids.

    Args:
        label_counts: How often each token id is a label; later ids have never been one.
    """
    counts = torch.as_tensor(label_counts)[:vocab_size]
    counts_V = torch.zeros(vocab_size, dtype=torch.float64)
    counts_V[: len(counts)] = counts
    ids_R = counts_V.sort(descending=True, stable=True).indices[:size].sort().values
    share = float(counts_V[ids_R].sum() / counts_V.sum())
    say(f"draft vocabulary: {size:,} of {vocab_size:,} tokens, {share:.2%} of the labels")
    return ids_R


def vocabulary_problems(d2t_R: Tensor, t2d_V: Tensor) -> list[str]:
    """Return what is wrong with EAGLE-3's two maps, or between them."""
    if d2t_R.dtype != torch.int64:
        return [f"d2t: is {d2t_R.dtype}, must be int64 offsets, target id - draft id"]
    ids_R = d2t_R + torch.arange(len(d2t_R))
    if problems := _id_problems(ids_R, vocab_size=len(t2d_V)):
        return [f"d2t: {problem}: offsets, target id - draft id" for problem in problems]
    named_V = torch.zeros(len(t2d_V), dtype=torch.bool)
    named_V[ids_R] = True
    if not torch.equal(named_V, t2d_V.bool()):
        wrong = int((named_V != t2d_V.bool()).sum())
        return [f"d2t and t2d: name different tokens ({wrong} of {len(t2d_V)}): one of them is shifted"]
    return []


def token_map_problems(ids_R: Tensor, *, vocab_size: int) -> list[str]:
    """Return what is wrong with Medusa's map, the target's id of each draft token."""
    if ids_R.dtype != torch.int64:
        return [f"token_map: is {ids_R.dtype}, must be int64, the target's ids"]
    return [f"token_map: {problem}" for problem in _id_problems(ids_R, vocab_size=vocab_size)]


def padding_problems(folder: Path, *, num_tokens: int) -> list[str]:
    """Return why a drafter folder's vocabulary cannot be trained: it has ids that are padding of the target's head.

    They can be drafted, and are never accepted; but labels and the target's distribution end at the tokenizer's last id.

    Args:
        num_tokens: Ids that the tokenizer can produce.
    """
    found = []
    for name, stored_R in tensors_named(folder, MAPS).items():
        ids_R = stored_R + torch.arange(len(stored_R)) if name == "d2t" else stored_R
        padding = ids_R[ids_R >= num_tokens].tolist()
        if padding:
            shown = ", ".join(map(str, padding[:SHOWN])) + (", ..." if len(padding) > SHOWN else "")
            found.append(
                f"{folder}: {name} names {len(padding)} of {len(ids_R)} tokens that the target's tokenizer does not have, ids {shown}: "
                f"to be trained, ids must be in 0..{num_tokens - 1}"
            )
    return found


def _id_problems(ids_R: Tensor, *, vocab_size: int) -> list[str]:
    if len(ids_R) and (int(ids_R.min()) < 0 or int(ids_R.max()) >= vocab_size):
        return [f"gives ids {int(ids_R.min())}..{int(ids_R.max())}, must be in 0..{vocab_size - 1}"]
    return [] if len(ids_R.unique()) == len(ids_R) else ["gives some ids twice"]
