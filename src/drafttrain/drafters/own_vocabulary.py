"""The maps between a drafter's own vocabulary and its target's, as modules of the drafter: engines expect `d2t` and `t2d`.

R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.draft_vocabulary import most_frequent, vocabulary_problems


class OwnVocabulary(nn.Module):
    """A drafter whose head may have a part of the target's tokens."""

    d2t: Tensor | None
    """The target's id minus the drafter's, of each of the drafter's tokens; None: the vocabularies are the same."""
    t2d: Tensor | None
    """Whether the drafter has each of the target's tokens."""
    _keeps_vocabulary: bool = False

    def add_vocabulary(self, config: dict[str, Any]) -> None:
        """Create the maps of a configuration; without `draft_vocab_size` the vocabularies are the same."""
        rows, size = config.get("draft_vocab_size"), config["vocab_size"]
        part = 0 if rows is None or rows == size else int(rows)
        self.register_buffer("d2t", torch.zeros(part, dtype=torch.long) if part else None)
        self.register_buffer("t2d", torch.arange(size) < part if part else None)

    @abstractmethod
    def start_head(self) -> None:
        """Copy what the head starts from, for this vocabulary."""

    def fit_vocabulary(self, label_counts: Callable[[], Any]) -> None:
        """Choose the most frequent labels, ties by lower id. A drafter loaded from a checkpoint keeps its vocabulary."""
        if self.d2t is None or self.t2d is None or self._keeps_vocabulary:
            return
        ids_R = most_frequent(label_counts(), size=len(self.d2t), vocab_size=len(self.t2d))
        self.d2t.copy_(ids_R - torch.arange(len(ids_R)))
        self.t2d.zero_()[ids_R] = True
        self.start_head()

    def check_vocabulary(self, where: str) -> None:
        """Refuse maps between the vocabularies that contradict each other.

        Raises:
            CheckpointError: Naming the map and what is wrong.
        """
        if self.d2t is not None and self.t2d is not None and (found := vocabulary_problems(self.d2t, self.t2d)):
            raise CheckpointError(f"{where}: {found[0]}")

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's vocabulary; None: the vocabularies are the same."""
        return None if self.d2t is None else torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t
