"""Checks of the two maps between a drafter's vocabulary and its target's.

R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

import torch


def vocabulary_problems(d2t_R: torch.Tensor, t2d_V: torch.Tensor) -> list[str]:
    """Return what is wrong with the maps, or between them."""
    if d2t_R.dtype != torch.int64:
        return [f"d2t: is {d2t_R.dtype}, must be int64 offsets, target id - draft id"]
    ids_R = d2t_R + torch.arange(len(d2t_R))
    if len(d2t_R) and (int(ids_R.min()) < 0 or int(ids_R.max()) >= len(t2d_V)):
        return [
            f"d2t: gives ids {int(ids_R.min())}..{int(ids_R.max())}, must be in 0..{len(t2d_V) - 1}: "
            "offsets, target id - draft id"
        ]
    named_V = torch.zeros(len(t2d_V), dtype=torch.bool)
    named_V[ids_R] = True
    if int(named_V.sum()) != len(d2t_R):
        return ["d2t: gives some ids twice"]
    if not torch.equal(named_V, t2d_V.bool()):
        wrong = int((named_V != t2d_V.bool()).sum())
        return [f"d2t and t2d: name different tokens ({wrong} of {len(t2d_V)}): one of them is shifted"]
    return []
