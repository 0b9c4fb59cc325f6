"""The map between a drafter's token ids and the target's.

N = rows, V = the target's ids, R = tokens that can be drafted, W = width of the drafter's head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.core.probability import over_target_vocabulary, sampling_probs
from drafttrain.core.texts import Sampling


def share_of_tokens(texts: Iterable[Sequence[int]], vocabulary_R: Tensor) -> float:
    """Return the share of the tokens of texts that a draft vocabulary holds; nan without tokens."""
    tokens_N = torch.tensor([token for text in texts for token in text])
    return float(torch.isin(tokens_N, vocabulary_R.cpu()).double().mean())


class DraftVocabulary:
    """The tokens that a drafter can draft, as the target's ids.

    Args:
        own_R: The target's id of each token in the drafter's own vocabulary; None: its ids are the target's, without the
            padding after the tokenizer's last id.
        num_tokens: Ids that the tokenizer can produce.
        only: Of ids that are the target's, those that can be drafted; None: all. The others get no probability.
    """

    def __init__(self, own_R: Tensor | None, *, num_tokens: int, only: Tensor | None = None) -> None:
        self.ids_R = torch.arange(num_tokens) if own_R is None else own_R
        self._is_targets = own_R is None
        self._copies = {self.ids_R.device: self.ids_R}
        self._excluded_R = None if only is None else torch.isin(self.ids_R, only, invert=True)

    def _on(self, device: torch.device) -> Tensor:
        """Return the ids on a device, where they are copied once."""
        if device not in self._copies:
            self._copies[device] = self.ids_R.to(device)
        return self._copies[device]

    def logits(self, logits_NW: Tensor) -> Tensor:
        """Return the logits_NR of the tokens that can be drafted."""
        logits_NR = logits_NW[..., : len(self.ids_R)]
        if self._excluded_R is None:
            return logits_NR
        self._excluded_R = self._excluded_R.to(logits_NR.device)
        return logits_NR.masked_fill(self._excluded_R, -torch.inf)

    def likeliest(self, logits_NW: Tensor) -> Tensor:
        """Return the target's id of each row's argmax among the tokens that can be drafted."""
        return self._on(logits_NW.device)[self.logits(logits_NW).argmax(dim=-1)]

    def ids(self, drafted: Sequence[int]) -> list[int]:
        """Return the target's ids of tokens that are given by their place among those that can be drafted."""
        if self._is_targets:
            return list(drafted)
        ids: list[int] = self._on(torch.device("cpu"))[list(drafted)].tolist()
        return ids

    def best(self, logits_NW: Tensor, *, count: int) -> Tensor:
        """Return the target's ids of each row's `count` likeliest tokens that can be drafted, best first."""
        return self._on(logits_NW.device)[self.logits(logits_NW).topk(count, dim=-1).indices]

    def probs(self, logits_NW: Tensor, sampling: Sampling, *, size: int) -> Tensor:
        """Return probs_NV, each row's drafting distribution over the target's `size` ids."""
        return self.over_target(sampling_probs(self.logits(logits_NW), sampling), size=size)

    def over_target(self, probs_NR: Tensor, *, size: int) -> Tensor:
        """Return distributions over the tokens that can be drafted as distributions over the target's `size` ids."""
        if self._is_targets:
            return pad(probs_NR, (0, size - probs_NR.shape[-1]))
        return over_target_vocabulary(probs_NR, self._on(probs_NR.device)[: probs_NR.shape[-1]], size=size)

    def places(self, *, size: int) -> Tensor:
        """Return, by target id, the drafter's id; -1 if it cannot draft the token."""
        places_V = self.ids_R.new_full((size,), -1)
        places_V[self.ids_R] = torch.arange(len(self.ids_R), device=self.ids_R.device)
        return places_V
