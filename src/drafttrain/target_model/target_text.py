"""A text that a drafter drafted in its own tokens, encoded again with the target's tokenizer after the text before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from drafttrain.target_model.spelling import Spelling

LOOK_BACK = 16
"""Tokens of the text before that are encoded again with a draft: its first tokens depend on the characters before it."""


class TargetText:
    """The target's tokens of what a drafter drafted.

    The end of the text before and the draft are encoded together. Where the text ends between two tokens of that, the tokens after
    its end are the draft. Else the target has already split the text differently from its tokenizer (it sampled, or has just begun a
    word), and its last tokens cannot be taken back: the longest tokens follow until both agree where one ends.

    Args:
        control: The drafter's id of each special token of the target that both have.
        num_tokens: Ids below this have a row in the target's embedding.

    Source: Timor et al. 2025, arXiv 2502.05202 (string-level exact match).
    """

    def __init__(self, target: Spelling, own: Spelling, *, control: Mapping[int, int], num_tokens: int) -> None:
        self._target = target
        self._own = own
        self._control = {ours: theirs for theirs, ours in control.items()}
        self._own_control, self._target_control = set(own.control.values()), set(target.control.values())
        self._num_tokens = num_tokens
        self._by_bytes = {spelled: ids[0] for spelled, ids in target.by_bytes().items() if ids[0] < num_tokens}
        self._longest = max(map(len, self._by_bytes), default=0)

    def after(self, text: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Return the target's tokens that spell what these own tokens spell.

        They end before a special token that the target lacks, before bytes that are no whole character, and before text that its
        tokenizer changes.

        Args:
            text: The target's tokens before them. It ends at the end of a character.
        """
        found: list[int] = []
        before, begins = self._end(text)
        for is_control, group in groupby(drafted, key=self._own_control.__contains__):
            ids = list(group)
            if is_control:
                known = [self._control[one] for one in ids if one in self._control]
                found += known
                whole, before, begins = len(known) == len(ids), b"", True
            else:
                new = b"".join(self._own.pieces(ids, begins=begins))
                tokens, whole = self._tokens(before, new, begins=begins)
                found += tokens
            if not whole:
                break
        return found

    def _end(self, text: Sequence[int]) -> tuple[bytes, bool]:
        """Return the last characters of a text, and whether a new text begins after it."""
        last = list(text[-LOOK_BACK:])
        start = next((i + 1 for i in reversed(range(len(last))) if last[i] in self._target_control), 0)
        is_first = start > 0 or len(last) == len(text)
        before = b"".join(self._target.pieces(last[start:], begins=is_first))
        return _whole_end(before), is_first and start == len(last)

    def _tokens(self, before: bytes, new: bytes, *, begins: bool) -> tuple[list[int], bool]:
        """Return the tokens that spell `new` after `before`, and whether they spell all of it."""
        text = _whole_start(before + new)
        ids = self._target.encode(text.decode())
        ends = {0: 0} if begins else {}
        agreeing, reached = 0, 0
        for id, piece in zip(ids, self._target.pieces(ids, begins=True), strict=True):
            if id >= self._num_tokens or not text.startswith(piece, reached):
                break
            agreeing, reached = agreeing + 1, reached + len(piece)
            ends.setdefault(reached, agreeing)
        found: list[int] = []
        place = len(before)
        while place < len(text) and place not in ends:
            spelled = self._longest_at(text, place)
            if spelled is None:
                return found, False
            found.append(self._by_bytes[spelled])
            place += len(spelled)
        if place in ends:
            found += ids[ends[place] : agreeing]
            place = reached
        return found, place == len(before) + len(new)

    def _longest_at(self, text: bytes, place: int) -> bytes | None:
        """Return the longest token that a text has at a place."""
        pieces = (text[place:end] for end in range(min(len(text), place + self._longest), place, -1))
        return next((piece for piece in pieces if piece in self._by_bytes), None)


def _whole_start(text: bytes) -> bytes:
    """Return a text up to the first bytes that are no whole character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


def _whole_end(text: bytes) -> bytes:
    """Return a text after the last bytes that are no whole character."""
    while True:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            text = text[error.end :]
        else:
            return text
