"""A causal LM that drafts each token with as few of its layers as are confident of it.

N = tokens, D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters.causal_lm.decoding import PLAIN_MODELS, DecodingLM, is_plain
from drafttrain.target_model.ragged_cache import Tree


class RoutedLM:
    """A `DraftLM` with an exit after some of its layers, each with the model's final norm and head.

    A token is drafted from the first exit whose largest probability reaches its threshold. The layers after it run once a later token
    needs them: they then read the states of all tokens that they have missed, in one call, so that their keys and values are those of a
    model that runs all layers at every token.

    Args:
        model: A plain Llama, Qwen2 or Qwen3.
        exits: The layers after which it may draft, ascending; the last layer is one more.
        thresholds: Of each exit, and of the last layer. At 0 an exit is always confident, above 1 never.
        num_tokens: Ids that the tokenizer can produce: rows of the head after them are padding.

    Raises:
        CheckpointError: The model is not one that `DecodingLM` computes.

    Source: Kavehzadeh et al. 2024, S2D, arXiv 2407.01955: adaptive draft selection.
    """

    def __init__(
        self,
        model: Any,
        *,
        exits: Sequence[int],
        thresholds: Sequence[float],
        num_tokens: int,
        listener: ForwardListener | None = None,
    ) -> None:
        if not is_plain(model):
            raise CheckpointError(
                f"exits after some layers need a plain {', '.join(PLAIN_MODELS)} with attention sdpa on one device, and this drafter's "
                f"{type(model).__name__} has another attention, rotary angles, activation, or a changed module"
            )
        bounds = [0, *exits, len(model.model.layers)]
        assert len(thresholds) == len(bounds) - 1, "one for each exit"
        self._parts = [
            DecodingLM(model, name="drafter", listener=listener, running=range(*ends)) for ends in pairwise(bounds)
        ]
        self._thresholds = thresholds
        self._num_tokens = num_tokens
        weight_VD = model.get_input_embeddings().weight
        self._nothing = weight_VD.detach().new_empty(0, weight_VD.shape[1])
        self._missed: list[list[list[Tensor]]] = []
        """By part after the first and by sequence, the state_D of each token that the part has yet to read."""
        self.unsure: list[bool] = []
        """By sequence, whether no exit was confident in the last call."""

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache by sequence, including pending ones."""
        return self._parts[0].lengths

    @property
    def kept(self) -> list[int]:
        """Tokens in the cache by sequence at the last `keep`."""
        return self._parts[0].kept

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return None: sequences of any length can be batched."""
        return None

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Empty the cache, and read these prompts with the layers before the first exit. Prompts may be empty."""
        first, *later = self._parts
        self._missed = [[[] for _ in prompts] for _ in later]
        seen = first.begin(prompts, needs=TargetNeeds(hidden=(first.running.stop,)))
        for part in later:
            part.begin([[]] * len(prompts))
        self._store(0, seen)

    def forward(
        self, tokens: Sequence[Sequence[int]], *, parents: Sequence[Tree] | None = None, needs: TargetNeeds
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence; return the outputs of the last one of each, from the exit that drafts after it."""
        assert parents is None, "exits draft chains"
        found = [TargetOutput()] * len(tokens)
        going = [sequence for sequence, own in enumerate(tokens) if own]
        inputs: Sequence[Sequence[int]] = tokens
        embedded: list[Tensor] | None = None
        for number, (part, threshold) in enumerate(zip(self._parts, self._thresholds, strict=True)):
            if number:
                embedded = self._taken(number - 1, going)
                inputs = [[0] * len(states_ND) for states_ND in embedded]
            final, states = number == len(self._parts) - 1, TargetNeeds(hidden=(part.running.stop,))
            # An exit that is never confident needs no head.
            seen = part.forward(
                inputs, needs=needs | states if final or threshold <= 1 else states, embedded=embedded, last=True
            )
            if not final:
                self._store(number, seen)
            for sequence in going:
                found[sequence] = seen[sequence]
            going = self._unsure(found, going, threshold)
            if not going:
                break
        self.unsure = [sequence in going for sequence in range(len(tokens))]
        return found

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of each sequence's pending tokens, its first ones, and drop the others."""
        self._parts[0].keep(nodes)
        for missed, (before, part) in zip(self._missed, pairwise(self._parts), strict=True):
            part.cut(before.lengths)
            for states, length, read in zip(missed, before.lengths, part.lengths, strict=True):
                del states[length - read :]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order. The others are finished."""
        for part in self._parts:
            part.drop(keep)
        self._missed = [[missed[sequence] for sequence in keep] for missed in self._missed]

    def _store(self, number: int, seen: Sequence[TargetOutput]) -> None:
        """Store what part `number` has made of its tokens, for the part after it."""
        stop, missed = self._parts[number].running.stop, self._missed[number]
        for states, one in zip(missed, seen, strict=True):
            states += one.hidden_BTD[stop][0] if one.hidden_BTD else ()

    def _taken(self, number: int, going: Sequence[int]) -> list[Tensor]:
        """Return states_ND that the part after `number` reads now: those missed by sequences that are going on."""
        taken = [self._nothing] * len(self._missed[number])
        for sequence in going:
            taken[sequence] = torch.stack(self._missed[number][sequence])
            self._missed[number][sequence] = []
        return taken

    def _unsure(self, found: Sequence[TargetOutput], going: Sequence[int], threshold: float) -> list[int]:
        """Return the sequences whose distribution has no probability that reaches the threshold."""
        # The device is not read where nothing depends on it.
        if threshold <= 0 or threshold > 1:
            return [] if threshold <= 0 else list(going)
        rows = [out.logits_BTV[0, -1] for out in (found[sequence] for sequence in going) if out.logits_BTV is not None]
        largest_N = torch.stack(rows)[:, : self._num_tokens].float().softmax(dim=-1).max(dim=-1).values
        return [sequence for sequence, largest in zip(going, largest_N.tolist(), strict=True) if largest < threshold]
