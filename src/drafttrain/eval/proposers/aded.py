"""ADED: a tree search over a table of trigrams, which is sharpened by the text as it is written."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, Proposal, Verdict
from drafttrain.core.roles import Proposer
from drafttrain.core.settings import setting
from drafttrain.eval.proposers import Surroundings, TextProposer, proposers
from drafttrain.eval.proposers.ngram_counts import CorpusSettings, NgramCounts
from drafttrain.eval.proposers.token_tree import TokenTree

EXPLORE, FLATTEN = 32.0, 8.0
"""c1 and c2 of the search."""


@dataclass
class AdedSettings(CorpusSettings):
    """A tree search over a table of trigrams, which is sharpened by the text as it is written."""

    text_weight: float = setting(
        8.0, help="What an n-gram of the text so far counts, where one of the corpus counts 1.", gt=0
    )
    simulations: int = setting(150, help="Paths that the search tries in a round.", ge=1)
    successors: int = setting(12, help="Likeliest successors of two tokens that the search chooses from.", ge=1)
    nodes: int = setting(64, help="Most nodes of the tree; eval.length may allow fewer.", ge=1)
    warm: bool = setting(
        False, help="Keep the counts of a text for the next ones; else each starts from the corpus alone."
    )


class TrigramTable:
    """P(token | the two before it): the counts of a corpus and of a text, normalized. Unseen pairs use the last token alone."""

    def __init__(self, corpus: NgramCounts, text: NgramCounts, *, successors: int) -> None:
        self._parts = (corpus.following, text.following)
        self._successors = successors

    def row(self, pair: tuple[int, ...]) -> list[tuple[int, float]]:
        """Return the likeliest successors and their probabilities, best first; empty: nothing is known."""
        for known in (pair, pair[-1:]):
            counts: dict[int, float] = defaultdict(float)
            for part in self._parts:
                for token, count in part.get(known, {}).items():
                    counts[token] += count
            if counts:
                total = sum(counts.values())
                best = sorted(counts, key=lambda token: (-counts[token], token))[: self._successors]
                return [(token, counts[token] / total) for token in best]
        return []


@dataclass
class _Node:
    """A path of the search. Its value is the expected number of accepted tokens, if the table's probabilities are true."""

    pair: tuple[int, ...]
    parent: int
    chance: float
    """Of the whole path."""
    depth: int
    children: list[int] | None = None
    visits: int = 0
    score: float = 0.0


class TreeSearch:
    """Monte-Carlo search of the paths below two tokens.

    Args:
        depth: Tokens of a path.
        random_stream: Only for the continuation of paths that are tried for the first time.
    """

    def __init__(self, table: TrigramTable, pair: tuple[int, ...], *, depth: int, random_stream: random.Random) -> None:
        self._table = table
        self._depth = depth
        self._random = random_stream
        self._rows: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        self._nodes = [_Node(pair, -1, 1.0, 0)]

    def run(self, simulations: int) -> None:
        """Try this many paths."""
        for _ in range(simulations):
            node, gained = self._select()
            value = 1.0 + gained + self._continued(node)
            while node >= 0:
                self._nodes[node].visits += 1
                self._nodes[node].score += value
                node = self._nodes[node].parent

    def grow(self, tree: TokenTree) -> None:
        """Add the paths that were tried most often, then the likeliest successor of each of their ends."""
        # A path was tried at least as often as its continuations, and was found before them: parents come first.
        tried = [number for number, node in enumerate(self._nodes) if number and node.visits]
        place = {0: 0}
        for number in sorted(tried, key=lambda number: (-self._nodes[number].visits, number)):
            node = self._nodes[number]
            added = tree.child(place[node.parent], node.pair[-1]) if node.parent in place else None
            if added is not None:
                place[number] = added
        for number, added in list(place.items()):
            if row := self._row(self._nodes[number].pair):
                tree.child(added, row[0][0])

    def _select(self) -> tuple[int, float]:
        """Return the path to try, and the value of its tokens."""
        number, gained = 0, 0.0
        while self._nodes[number].depth < self._depth:
            node = self._nodes[number]
            if node.children is None:
                node.children = self._expand(number)
            if not node.children:
                break
            number = max(node.children, key=lambda child: self._promise(self._nodes[child], node))
            gained += self._nodes[number].chance
            if not self._nodes[number].visits:
                break
        return number, gained

    def _expand(self, number: int) -> list[int]:
        node, first = self._nodes[number], len(self._nodes)
        for token, prob in self._row(node.pair):
            self._nodes.append(_Node((node.pair[-1], token), number, node.chance * prob, node.depth + 1))
        return list(range(first, len(self._nodes)))

    def _promise(self, child: _Node, node: _Node) -> float:
        """Return the mean value of a child, and what is added for those that were tried seldom (PUCT)."""
        mean = child.score / child.visits if child.visits else 0.0
        constant = EXPLORE + math.log((node.visits + FLATTEN + 1) / FLATTEN)
        return mean + constant * (child.chance / node.chance) * math.sqrt(node.visits) / (1 + child.visits)

    def _continued(self, number: int) -> float:
        """Return the value of tokens that are drawn from the table after a path."""
        node, gained = self._nodes[number], 0.0
        pair, chance = node.pair, node.chance
        for _ in range(self._depth - node.depth):
            row = self._row(pair)
            if not row:
                break
            ((token, prob),) = self._random.choices(row, weights=[prob for _, prob in row])
            chance *= prob
            gained += chance
            pair = (pair[-1], token)
        return gained

    def _row(self, pair: tuple[int, ...]) -> list[tuple[int, float]]:
        if pair not in self._rows:
            self._rows[pair] = self._table.row(pair)
        return self._rows[pair]


class _Searched:
    """The counts of one text, and its search."""

    def __init__(self, context: Context, settings: AdedSettings, *, corpus: NgramCounts, text: NgramCounts) -> None:
        self._context = context
        self._settings = settings
        self._counts = text
        self._table = TrigramTable(corpus, text, successors=settings.successors)
        self._counted = 0

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        tokens, settings = self._context.tokens, self._settings
        self._counts.add(tokens, start=self._counted, weight=settings.text_weight)
        self._counted = len(tokens)
        tree = TokenTree(tokens[-1], replace(budget, nodes=min(budget.nodes, settings.nodes)))
        if budget.nodes:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            search = TreeSearch(self._table, tuple(tokens[-2:]), depth=budget.depth, random_stream=random.Random(seed))
            search.run(settings.simulations)
            search.grow(tree)
        return tree.proposal()

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        pass


@proposers.register("aded", AdedSettings)
class Aded(TextProposer):
    """A FIXED tree of the paths that a search over the table tried most often. Only its own stream of random numbers is used.

    Source: Liu et al. 2024, Adaptive Draft-Verification for Efficient Large Language Model Decoding, arXiv 2407.12021. There a
    trigram of the last 16 tokens adds 0.04 to an unnormalized probability; here rows are counts, normalized.
    """

    def __init__(self, settings: AdedSettings | None = None, corpus: Sequence[int] = ()) -> None:
        self.settings = settings or AdedSettings()
        self._corpus = NgramCounts()
        self._corpus.add(corpus)
        self._text = NgramCounts()

    @classmethod
    def create(cls, settings: AdedSettings, surroundings: Surroundings) -> Proposer:
        return cls(settings, settings.corpus_tokens(surroundings.target.tokenizer))

    def start(self, context: Context) -> _Searched:
        text = self._text if self.settings.warm else NgramCounts()
        return _Searched(context, self.settings, corpus=self._corpus, text=text)

    def forget(self) -> None:
        self._text.following.clear()
