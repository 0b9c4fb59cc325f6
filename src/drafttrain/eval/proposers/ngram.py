"""Prompt lookup: draft the tokens that followed the same text earlier, found by a suffix automaton."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, Proposal, Verdict, fixed_chain
from drafttrain.core.settings import setting
from drafttrain.eval.proposers import TextProposer, proposers
from drafttrain.eval.proposers.suffix_automaton import SuffixAutomaton


@dataclass
class NgramSettings:
    """Draft the tokens that followed the longest earlier match of the text's end."""

    min_ngram: int = setting(1, help="Shortest match that is copied from, in tokens.", ge=1)


class _Lookup:
    """The prompt lookup of one text."""

    def __init__(self, context: Context, settings: NgramSettings) -> None:
        self._context = context
        self._settings = settings
        self._automaton = SuffixAutomaton()

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        self._automaton.extend(self._context.tokens[len(self._automaton.tokens) :])
        count = min(budget.nodes, budget.depth)
        copied = self._automaton.continuation(count, least=self._settings.min_ngram)
        return fixed_chain(self._context.tokens[-1], copied)

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        pass


@proposers.register("ngram", NgramSettings)
class Ngram(TextProposer):
    """A FIXED chain, copied from the text so far.

    Source: Saxena 2023, Prompt Lookup Decoding. There, and in transformers, a match of bounded length is copied from its
    first occurrence; here the longest match, from its last occurrence.
    """

    def __init__(self, settings: NgramSettings | None = None) -> None:
        self.settings = settings or NgramSettings()

    def start(self, context: Context) -> _Lookup:
        return _Lookup(context, self.settings)
