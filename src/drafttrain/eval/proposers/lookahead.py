"""Lookahead decoding: a window of Jacobi iterations finds n-grams; those that begin with the last token are drafted.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.probability import likeliest
from drafttrain.core.proposals import Budget, Context, Proposal, Verdict
from drafttrain.core.settings import setting
from drafttrain.drafters.text_drafts import nodes_along
from drafttrain.eval.proposers import TextProposer, proposers
from drafttrain.eval.proposers.token_tree import TokenTree


@dataclass
class LookaheadSettings:
    """N-grams that the target's Jacobi iterations passed through."""

    window: int = setting(7, help="Positions ahead that are iterated in each round.", ge=1)
    level: int = setting(5, help="Tokens of an n-gram.", ge=2)
    guesses: int = setting(
        7, help="N-grams with the same first token that are stored and drafted, the latest ones.", ge=1
    )


class NgramPool:
    """The latest different n-grams by their first token."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._following: dict[int, list[tuple[int, ...]]] = {}

    def add(self, tokens: list[int]) -> None:
        """Add an n-gram, or make it the latest."""
        first, rest = tokens[0], tuple(tokens[1:])
        others = [one for one in self._following.get(first, []) if one != rest]
        self._following[first] = [rest, *others][: self._most]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """Return what followed a token, the latest first."""
        return self._following.get(token, [])


class _Lookahead:
    """The window and the pool of one text.

    Window position j holds the tokens of its last iterations, oldest first. In the tree the oldest tokens of all positions
    form a chain below the root, and the later ones of position j hang below its node: so each is computed from those of the
    iteration before it, all in the target's one call.
    """

    def __init__(self, context: Context, settings: LookaheadSettings) -> None:
        self._context = context
        self._settings = settings
        self._pool = NgramPool(settings.guesses)
        self._window: list[list[int]] = []

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        tokens = self._context.tokens
        if not self._window:
            places = torch.randint(len(tokens), (self._settings.window,), generator=generator).tolist()
            self._window = [[tokens[place]] for place in places]
        tree = TokenTree(tokens[-1], budget)
        for rest in self._pool.after(tokens[-1]):
            if len(tree.tokens) > budget.nodes // 2:
                break  # the other nodes find new n-grams
            tree.add(rest)
        for path in self._paths():
            tree.add(path)
        return tree.proposal()

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Iterate the positions whose nodes were all in the tree."""
        paths = self._paths()
        nodes = nodes_along(verdict.proposal, paths)
        read = [place for place, path in enumerate(paths) if len(nodes[place]) == len(path)]
        if not read:
            return
        ends = torch.tensor([nodes[place][-1] for place in read]).to(logits_NV.device)
        for place, token in zip(read, likeliest(logits_NV[ends]).tolist(), strict=True):
            iterated = [*self._window[place], token]
            if len(iterated) == self._settings.level:
                self._pool.add(iterated)
                iterated = iterated[1:]
            self._window[place] = iterated

    def _paths(self) -> list[list[int]]:
        """Return the tokens from the root to the newest token of each position."""
        oldest = [tokens[0] for tokens in self._window]
        return [[*oldest[: place + 1], *tokens[1:]] for place, tokens in enumerate(self._window)]


@proposers.register("lookahead", LookaheadSettings)
class Lookahead(TextProposer):
    """A FIXED tree: n-grams of the pool that begin with the root, and the window that finds new ones.

    Without a draft tree (a chain length) only one of the two fits, the pool first.

    Source: Fu et al. 2024, Break the Sequential Dependency of LLM Inference Using Lookahead Decoding, arXiv 2402.02057. Here the
    nodes of the window may be accepted too, as they are nodes like all others.
    """

    def __init__(self, settings: LookaheadSettings | None = None) -> None:
        self.settings = settings or LookaheadSettings()

    def start(self, context: Context) -> _Lookahead:
        return _Lookahead(context, self.settings)
