"""The suffix automaton of a growing text: the longest text at its end that occurred before, and where."""

from collections.abc import Sequence

NESTED = 8
"""Nested matches whose latest place is stored, the longest first. More change nothing measurable (benchmarks/proposers.md)."""


class SuffixAutomaton:
    """Reads tokens one by one, each in constant time on average, and has at most two states a token.

    A state stands for all substrings that end at the same places. The link of a state leads to the longest of its suffixes
    that also ends elsewhere. So the link of the whole text is the longest match.

    Source: Blumer et al. 1985, The smallest automaton recognizing the subwords of a text; as a drafter: Hu et al. 2024,
    SAM Decoding, arXiv 2411.10666.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.match_length = 0
        """Tokens at the end of the text that occurred before; 0: none."""
        self.match_end = 0
        """Number of tokens up to the end of an earlier occurrence of that match."""
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._latest = [0]
        """By state, the end of its latest known occurrence."""
        self._whole = 0
        """The state of the whole text."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Read the next tokens of the text."""
        for token in tokens:
            self._append(token)

    def continuation(self, count: int, *, least: int = 1) -> list[int]:
        """Return up to `count` tokens that followed the match, if it has at least `least` tokens."""
        end = self.match_end
        return self.tokens[end : end + count] if self.match_length >= least else []

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        state = self._whole
        self._whole = new = self._add({}, length=self._length[state] + 1, latest=len(self.tokens))
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            self._link[new] = self._shared(state, token)
        self._find_match()

    def _shared(self, state: int, token: int) -> int:
        """Return the state that holds exactly the substrings of `state` with this token after them; split it off if needed."""
        follower = self._next[state][token]
        if self._length[follower] == self._length[state] + 1:
            return follower
        part = self._add(dict(self._next[follower]), length=self._length[state] + 1, latest=self._latest[follower])
        self._link[part], self._link[follower] = self._link[follower], part
        while state >= 0 and self._next[state].get(token) == follower:
            self._next[state][token] = part
            state = self._link[state]
        return part

    def _find_match(self) -> None:
        state = self._link[self._whole]
        self.match_length, self.match_end = self._length[state], self._latest[state]
        for _ in range(NESTED):
            if state <= 0:
                break
            self._latest[state] = len(self.tokens)
            state = self._link[state]

    def _add(self, following: dict[int, int], *, length: int, latest: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._latest.append(latest)
        return len(self._link) - 1
