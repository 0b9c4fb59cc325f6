"""The two maps between the vocabulary of a drafter and that of its target.

R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

import torch


def vocabulary_problems(d2t_R: torch.Tensor, t2d_V: torch.Tensor) -> list[str]:
    """Return why two maps between the drafter's vocabulary and the target's are none, or not the same."""
    if d2t_R.dtype != torch.int64:
        return [f"d2t: is {d2t_R.dtype}, must be int64 offsets, target id - draft id"]
    ids_R = d2t_R + torch.arange(len(d2t_R))
    if len(d2t_R) and (int(ids_R.min()) < 0 or int(ids_R.max()) >= len(t2d_V)):
        return [
            f"d2t: gives ids {int(ids_R.min())}..{int(ids_R.max())}, must be in 0..{len(t2d_V) - 1}: offsets, target id - draft id"
        ]
    said_V = torch.zeros(len(t2d_V), dtype=torch.bool)
    said_V[ids_R] = True
    if int(said_V.sum()) != len(d2t_R):
        return ["d2t: gives some ids twice"]
    if not torch.equal(said_V, t2d_V.bool()):
        wrong = int((said_V != t2d_V.bool()).sum())
        return [f"d2t and t2d: name different tokens ({wrong} of {len(t2d_V)}): one of them is shifted"]
    return []
