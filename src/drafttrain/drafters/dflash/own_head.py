"""The head of a block drafter: the target's, frozen; or an own one to train, over the whole vocabulary or a part of it.

N = rows, D = hidden, R = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drafttrain.core.batches import Head
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.few_rows import Product, product_with
from drafttrain.drafters.own_vocabulary import OwnVocabulary


class WithHead(OwnVocabulary):
    """A drafter's head, as modules of the drafter itself: engines expect `lm_head`, `d2t` and `t2d` beside the layers."""

    lm_head: nn.Linear | None
    _parts: TargetParts

    def add_head(self, config: dict[str, Any]) -> None:
        """Create the head of a configuration; without `draft_vocab_size` it is the target's."""
        rows = config.get("draft_vocab_size")
        self.lm_head = None if rows is None else nn.Linear(config["hidden_size"], rows, bias=False)
        self.add_vocabulary(config)

    @torch.no_grad()
    def start_head(self) -> None:
        """Copy the target's head, or its rows of this vocabulary."""
        if self.lm_head is None:
            return
        ids_R = torch.arange(self.lm_head.out_features) if self.vocabulary is None else self.vocabulary
        self.lm_head.weight.copy_(self._parts.head_rows(ids_R))

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
    def head_weights(self) -> Weights:
        """The weights of the head."""
        return self._parts.head_weights if self.lm_head is None else weights_of(self.lm_head)
