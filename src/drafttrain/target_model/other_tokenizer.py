"""A drafter's own tokenizer beside its target's: the tokens that both have, and a text of the target in the drafter's tokens.

R = shared tokens, T = tokens of a text of the target
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.end_tokens import end_of_text_id
from drafttrain.target_model.spelling import WORDS, Spelling
from drafttrain.target_model.target_text import TargetText
from drafttrain.target_model.tokenizer import num_ids

LEAST_SHARED = 0.01
"""Share of the target's tokens that the other tokenizer must have. With fewer nearly every draft token is rejected."""


@dataclass(frozen=True)
class Joint:
    """A place in a text from which it can be encoded by itself: what comes after does not change the tokens before."""

    num_tokens: int = 0
    """The target's tokens before it."""
    num_ids: int = 0
    """Own tokens before it."""
    begins: bool = True
    """A new text begins there, after a special token; else a word, with its space."""


@dataclass
class Reading:
    """A text of the target in the drafter's tokens."""

    ids: list[int]
    """Never empty: a text without any starts with the end-of-text token."""
    after_T: list[int] = field(default_factory=list)
    """How many own tokens spell the text up to the end of each token of the target; -1: that is inside an own token."""
    complete: bool = True
    """The text ends at the end of a character; else the bytes of its last, unfinished character are not read."""
    joint: Joint | None = None
    """The last one in the text; None: there is none but its start."""


class OtherTokenizer:
    """The tokenizer that a drafter reads text with, where its target has another one.

    Two tokens are the same if they spell the same bytes. Special tokens are the same if they have the same name; the end-of-text
    tokens are the same in any case. No token is shared twice.

    A text is decoded, and encoded again from its beginning, by the drafter's tokenizer. Special tokens that the drafter lacks are
    read as text; those that begin a text are replaced by the drafter's own.

    Args:
        target_rows: Rows of the target's embedding: tokens behind them are not shared.

    Raises:
        CheckpointError: What a tokenizer's tokens spell is not known (`token_bytes`).

    Source: Timor et al. 2025, arXiv 2502.05202, algorithm 4 (token-level intersection).
    """

    def __init__(self, target: Any, own: Any, *, target_rows: int | None = None, name: str = "the drafter") -> None:
        self.own = own
        self._target = Spelling(target, name="the target")
        self._own = Spelling(own, name=name)
        self._name = name
        self._control = self._same_control()
        pairs = self._same_text() | self._control
        rows = num_ids(target) if target_rows is None else target_rows
        shared = sorted((theirs, ours) for theirs, ours in pairs.items() if theirs < rows)
        self.num_target_tokens = min(rows, num_ids(target))
        self.target_R: Tensor = torch.tensor([theirs for theirs, _ in shared], dtype=torch.long)
        """The target's id of each shared token, ascending."""
        self.own_R: Tensor = torch.tensor([ours for _, ours in shared], dtype=torch.long)
        """The drafter's id of each of them."""

    @property
    def problem(self) -> str | None:
        """Why the tokenizers cannot be used together; None: they can."""
        count, total = len(self.target_R), self.num_target_tokens
        if count >= max(1, LEAST_SHARED * total):
            return None
        return (
            f"{self._name}: its tokenizer has {count} of the target's {total} tokens, fewer than {LEAST_SHARED:.0%}: nearly every draft "
            "token would be rejected. Use a drafter whose tokenizer shares more"
        )

    def check(self) -> None:
        """Refuse tokenizers that share too few tokens.

        Raises:
            CheckpointError: Naming both numbers.
        """
        if self.problem:
            raise CheckpointError(self.problem)

    def __str__(self) -> str:
        return f"the vocabularies share {len(self.target_R):,} of the target's {self.num_target_tokens:,} tokens"

    def target_of(self, own_N: Sequence[int]) -> list[int]:
        """Return the target's ids of shared tokens."""
        return [self._target_of[one] for one in own_N]

    def over_target(self, probs_NW: Tensor, *, size: int) -> Tensor:
        """Return distributions over the drafter's tokens, 0 outside the shared ones, over the target's `size` ids."""
        device = probs_NW.device
        probs_NV = probs_NW.new_zeros(*probs_NW.shape[:-1], size)
        probs_NV[..., self.target_R.to(device)] = probs_NW[..., self.own_R.to(device)]
        return probs_NV

    def read(self, tokens: Sequence[int], known: Reading | None = None) -> Reading:
        """Return a text of the target in the drafter's tokens.

        Args:
            known: The reading of a text that this one continues: only what is behind its joint is encoded again.
        """
        if known is not None and known.joint is not None:
            joint = known.joint
            made = Reading(known.ids[: joint.num_ids], known.after_T[: joint.num_tokens], joint=joint)
            place, begins = joint.num_tokens, joint.begins
        else:
            before = self._target.starts
            place, begins = len(before) if list(tokens[: len(before)]) == before else 0, True
            made = Reading(list(self._own.starts), [len(self._own.starts)] * place)
        while place < len(tokens):
            end = next((i for i in range(place, len(tokens)) if tokens[i] in self._control), len(tokens))
            if end > place:
                self._add_text(made, tokens[place:end], begins=begins)
            if end < len(tokens):
                made.ids.append(self._control[tokens[end]])
                made.after_T.append(len(made.ids))
                made.complete = True
                made.joint = Joint(end + 1, len(made.ids))
            place, begins = end + 1, True
        if not made.ids:
            made.ids.append(end_of_text_id(self.own) or 0)
            made.after_T = [-1] * len(tokens)
        return made

    def _add_text(self, made: Reading, tokens: Sequence[int], *, begins: bool) -> None:
        """Add the tokens of a text without special tokens."""
        pieces = self._target.pieces(tokens, begins=begins)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spelled = b"".join(pieces)
        text = decoder.decode(spelled)
        read = text.encode()
        made.complete = not decoder.getstate()[0]
        first = len(made.ids)
        # It puts a space before the word by itself.
        ids = self._own.encode(text[1:] if not begins and self._own.puts_space else text)
        made.ids += ids
        places = self._places(ids, read, begins=begins)
        places[0] = 0
        same = len(read)
        if not spelled.startswith(read):
            # Behind bytes that are no UTF-8, which are read as U+FFFD, places of the two texts do not correspond.
            same = next(place for place, (theirs, own) in enumerate(zip(spelled, read, strict=False)) if theirs != own)
        start, ends = len(made.after_T), list(accumulate(map(len, pieces)))
        made.after_T += [first + places[end] if end in places and end <= same else -1 for end in ends]
        if not self._own.joins_words:
            there = (
                i for i in reversed(range(len(ends))) if made.after_T[start + i] >= 0 and _begins_word(read, ends[i])
            )
            if (i := next(there, None)) is not None:
                made.joint = Joint(start + i + 1, made.after_T[start + i], begins=False)

    def _places(self, ids: Sequence[int], text: bytes, *, begins: bool) -> dict[int, int]:
        """Return, by the bytes before it, the number of own tokens; empty where these do not spell the text."""
        pieces = self._own.pieces(ids, begins=begins)
        if b"".join(pieces) != text:
            return {}
        return {end: number for number, end in enumerate(accumulate(map(len, pieces)), start=1)}

    def _same_text(self) -> dict[int, int]:
        """Return the drafter's id of each token of the target that spells the same bytes."""
        theirs, ours = self._target.by_bytes(), self._own.by_bytes()
        return {
            target: own
            for spelled in theirs.keys() & ours.keys()
            for target, own in zip(theirs[spelled], ours[spelled], strict=False)
        }

    def _same_control(self) -> dict[int, int]:
        """Return the drafter's id of each special token of the target that it has too."""
        ours = self._own.control
        same = {id: ours[token] for token, id in self._target.control.items() if token in ours}
        target_end, own_end = end_of_text_id(self._target.tokenizer), end_of_text_id(self.own)
        if target_end is not None and own_end is not None and target_end not in same and own_end not in same.values():
            same[target_end] = own_end
        return same

    @cached_property
    def target_text(self) -> TargetText:
        """Own tokens as the target's tokens of the same text."""
        return TargetText(self._target, self._own, control=self._control, num_tokens=self.num_target_tokens)

    @cached_property
    def _target_of(self) -> Mapping[int, int]:
        return dict(zip(self.own_R.tolist(), self.target_R.tolist(), strict=True))


def _begins_word(text: bytes, place: int) -> bool:
    """Return whether a space and a letter follow a letter there: tokenizers split before the space, whatever comes next."""
    return WORDS.match(text, place - 1) is not None
