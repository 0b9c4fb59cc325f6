"""One model of a cascade: it reads what it lacks of the shared text when its next distribution is wanted.

V = vocabulary, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from drafttrain.core.proposals import Context
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.target_model.cached_lm import CachedLM


class TextReader:
    """A model and its cache of one text.

    Tokens that the other model wrote are read in the call that needs them, so the ledger counts what a switch costs. A model that
    never writes never reads the prompt.

    Args:
        num_tokens: Ids from here on are padding, and get no probability.
    """

    def __init__(self, lm: CachedLM, sampling: Sampling, *, num_tokens: int) -> None:
        self.lm = lm
        self._sampling = sampling
        self._num_tokens = num_tokens
        self._text = Context("", [], 0)
        self._begun = False

    def begin(self, text: Context, *, begun: bool = False) -> None:
        """Start a new text.

        Args:
            begun: The cache already contains its prompt without the last token.
        """
        self._text, self._begun = text, begun

    def next(self) -> TargetProbs:
        """Return the distribution of the token after the text, as the only row."""
        return self._probs(self._read(keep=len(self._text.tokens) - 1)[-1:])

    def after(self, question: Sequence[int]) -> TargetProbs:
        """Return the distribution of the token after the text and these tokens, which leave nothing in the cache."""
        return self._probs(self._read(question, keep=len(self._text.tokens))[-1:])

    def of_tokens(self, start: int) -> TargetProbs:
        """Return the distributions of the tokens of the text from `start` on, a row each."""
        return self._probs(self._read(keep=start - 1)[start - 1 - len(self._text.tokens) : -1])

    def catch_up(self) -> None:
        """Read the text without its last token."""
        whole = len(self._text.tokens) - 1
        unread = self._unread(keep=whole)[:-1]
        if unread:
            self.lm.forward([unread], needs=TargetNeeds())
            self.lm.keep([range(len(unread))])

    def cut(self) -> None:
        """Drop what is no longer in the text, which became shorter, and its last token: the next row is after that."""
        if self._begun:
            self.lm.cut([min(self.lm.kept[0], len(self._text.tokens) - 1)])

    def _read(self, question: Sequence[int] = (), *, keep: int) -> Tensor:
        """Read the text and a question after at most `keep` cached tokens; return logits_NV of what was read."""
        unread = self._unread(keep=keep)
        (seen,) = self.lm.forward([[*unread, *question]], needs=TargetNeeds(logits=True))
        self.lm.keep([range(len(unread))])
        assert seen.logits_BTV is not None, "they were asked for"
        return seen.logits_BTV[0]

    def _unread(self, *, keep: int) -> list[int]:
        """Return the tokens of the text after the cached ones, of which at most `keep` are used."""
        text = self._text
        if not self._begun:
            self.lm.begin([text.tokens[: text.num_prompt_tokens - 1]])
            self._begun = True
        if self.lm.kept[0] > keep:
            self.lm.cut([keep])
        return text.tokens[self.lm.kept[0] :]

    def _probs(self, logits_NV: Tensor) -> TargetProbs:
        return TargetProbs(logits_NV, self._sampling, num_tokens=self._num_tokens)
