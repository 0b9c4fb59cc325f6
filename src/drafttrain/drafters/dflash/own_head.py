"""The head of a block drafter: the target's, frozen; or an own one to train, over the whole vocabulary or a part of it.

N = rows, D = hidden, R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.batches import Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.weights import weight_bytes
from drafttrain.drafters.draft_vocabulary import most_frequent, vocabulary_problems
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.few_rows import Product, product_with


class WithHead(nn.Module):
    """A drafter's head, as modules of the drafter itself: engines expect `lm_head`, `d2t` and `t2d` beside the layers."""

    lm_head: nn.Linear | None
    d2t: Tensor | None
    """The target's id minus the drafter's, of each of the drafter's tokens; None: the vocabularies are the same."""
    t2d: Tensor | None
    """Whether the drafter has each of the target's tokens."""
    _parts: TargetParts
    _keeps_vocabulary: bool = False

    def add_head(self, config: dict[str, Any]) -> None:
        """Create the head of a configuration; without `draft_vocab_size` it is the target's."""
        rows, size = config.get("draft_vocab_size"), config["vocab_size"]
        self.lm_head = None if rows is None else nn.Linear(config["hidden_size"], rows, bias=False)
        part = 0 if rows is None or rows == size else int(rows)
        self.register_buffer("d2t", torch.zeros(part, dtype=torch.long) if part else None)
        self.register_buffer("t2d", torch.arange(size) < part if part else None)

    @torch.no_grad()
    def start_head(self) -> None:
        """Copy the target's head, or its rows of this vocabulary."""
        if self.lm_head is None:
            return
        ids_R = torch.arange(self.lm_head.out_features) if self.vocabulary is None else self.vocabulary
        self.lm_head.weight.copy_(self._parts.head_rows(ids_R))

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

    @property
    def head(self) -> Head:
        """The head as losses use it: states_ND after the final norm, to logits_NR."""
        return self._parts.linear_head if self.lm_head is None else LinearHead(lambda _: self.lm_head)

    def decoding_head(self) -> Product:
        """Return the head as decoding uses it, with its weights prepared for few rows."""
        return self._parts.decoding_head() if self.lm_head is None else product_with([self.lm_head])

    @property
    def head_parameters(self) -> int:
        """Parameters that a row of logits is multiplied by."""
        return self._parts.head_parameters if self.lm_head is None else self.lm_head.weight.numel()

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return self._parts.head_bytes if self.lm_head is None else weight_bytes(self.lm_head)
