"""The largest draft that fits into a memory budget and pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.console import say_once
from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.reduce import Rate
from drafttrain.core.settings import setting
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.length import TreeSizeSettings, length_policies


@dataclass
class MemoryLengthSettings(TreeSizeSettings):
    """Draft the largest tree, or chain, that fits into the memory and pays."""

    gigabytes: float | None = setting(
        None,
        help="What decoding may hold at the peak of a round, for all sequences decoded together: weights, caches, logits and masks of "
        "both models, in 10^9 bytes; null: no limit.",
        gt=0,
    )
    num_draft_tokens: int = setting(24, help="Draft tokens per round at most.", ge=1)
    depth: int = setting(5, help="Levels at most.", ge=1)
    width: int = setting(4, help="Most children of a node; 1: chains.", ge=1)


@length_policies.register("memory", MemoryLengthSettings)
class MemoryLength:
    """Lossless: it decides by the text's length and by earlier rounds.

    The depth is the one with the most tokens per time, by the acceptance of earlier rounds and costs that are measured at the start;
    where none is faster than plain decoding, nothing is drafted. Of that depth the most nodes that fit are drafted, with fewer levels
    where not even a path fits.

    Source: Selin Yildirim and Deming Chen 2025, SpecMemo, arXiv 2506.01206.
    """

    def __init__(self, settings: MemoryLengthSettings) -> None:
        self.settings = settings
        self._memory: DecodingMemory | None = None
        self._level_cost, self._target_cost = 0.0, 1.0
        # Of the rounds that reached a level, the share that accepted it; each starts with one that did.
        self._accepted = [Rate(1.0, 1.0) for _ in range(settings.depth)]

    def fit(self, memory: DecodingMemory) -> None:
        """Store what decoding takes."""
        self._memory = memory

    def calibrate(self, generations: Sequence[Generation], events: Sequence[ForwardEvent] = ()) -> None:
        """Take the costs of a level and of a target call from measured rounds."""
        rounds = [one for generation in generations for one in generation.rounds]
        levels = sum(one.max_depth for one in rounds)
        if levels:
            self._level_cost = sum(generation.draft_seconds for generation in generations) / levels
            self._target_cost = sum(generation.verify_seconds for generation in generations) / len(rounds)

    def budget(self, context: Context) -> Budget:
        return self.budgets([context])[0]

    def budgets(self, contexts: Sequence[Context]) -> list[Budget]:
        """Return the same draft for each sequence: all of them together fit, if each were as long as the longest one."""
        most = self.settings
        wanted = Budget(most.num_draft_tokens, most.depth, most.width).within(self.paying_depth())
        if most.gigabytes is None:
            return [wanted] * len(contexts)
        assert self._memory is not None, "whoever builds a policy with a limit calls `fit`"
        limit, batch = most.gigabytes * 1e9, len(contexts)
        longest = max(contexts, key=lambda one: len(one.tokens))
        tokens, prompt = len(longest.tokens), longest.num_prompt_tokens
        found = self._memory.largest(limit, wanted, tokens, prompt=prompt, batch=batch)
        if wanted.nodes and not found.nodes:
            needed = self._memory.peak(Budget(1, 1), tokens, prompt=prompt, batch=batch) / 1e9
            together = f" of {batch} sequences together" if batch > 1 else ""
            say_once(
                f"eval.length: no draft{together} fits into {most.gigabytes:g} GB: one draft token each takes {needed:.3g} GB"
            )
        return [found] * batch

    def paying_depth(self) -> int:
        """Return the depth with the most tokens per time; 0: plain decoding is the fastest."""
        alive, tokens, rates = 1.0, 1.0, [1 / self._target_cost]
        for depth, accepted in enumerate(self._accepted, start=1):
            alive *= accepted.value
            tokens += alive
            rates.append(tokens / (self._target_cost + depth * self._level_cost))
        return max(range(len(rates)), key=rates.__getitem__)

    def more(self, step: DraftStep) -> bool:
        return True

    def observe(self, verdict: Verdict) -> None:
        for level, rate in enumerate(self._accepted, start=1):
            if verdict.max_depth >= level and verdict.num_accepted >= level - 1:
                rate.add(verdict.num_accepted >= level, 1)
