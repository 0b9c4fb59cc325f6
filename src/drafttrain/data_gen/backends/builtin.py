"""Texts by built-in decoding: every record is a pure function of recipe, target and seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from drafttrain.core.console import Progress, duration, say
from drafttrain.core.random import stream
from drafttrain.data_gen.backends import Outcome, Plan, Task, backends
from drafttrain.data_gen.decoding import continued
from drafttrain.distributed.collectives import any_of
from drafttrain.target_model import Target


@dataclass
class BuiltinSettings:
    """The loaded target generates the texts, in this process."""


@backends.register("builtin", BuiltinSettings)
class Builtin:
    """Decodes texts with the same sampling and similar prompt lengths together."""

    def __init__(self, settings: BuiltinSettings, plan: Plan) -> None:
        self.plan = plan

    def content(self) -> dict[str, Any]:
        """Return nothing: every plan holds target and dtype."""
        return {}

    def reproducible(self) -> dict[str, Any]:
        """Return nothing: all texts are reproducible."""
        return {}

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard."""
        if not any_of(bool(shards)):
            return
        with self.plan.target.for_own_share() as target:
            texts, plan = sum(map(len, shards.values())), self.plan
            say(f"{texts:,} texts of up to {plan.max_new_tokens} tokens, {plan.batch_size} at a time")
            count = TokenCount(bar, max_new_tokens=self.plan.max_new_tokens)
            for number, shard in shards.items():
                yield number, self._written(shard, target, bar, count)

    def _written(self, shard: Sequence[Task], target: Target, bar: Progress, count: TokenCount) -> list[Outcome]:
        plan = self.plan
        written: dict[int, list[int]] = {}
        order = sorted(range(len(shard)), key=lambda i: (shard[i].sampling.temperature, len(shard[i].prompt), i))
        for temperature in dict.fromkeys(task.sampling.temperature for task in shard):
            members = iter([i for i in order if shard[i].sampling.temperature == temperature])
            while batch := list(islice(members, plan.batch_size)):
                tasks = [shard[i] for i in batch]
                texts = continuations(tasks, target, max_new_tokens=plan.max_new_tokens, seed=plan.seed, written=count)
                written |= dict(zip(batch, texts, strict=True))
                bar.advance(len(batch))
        return [Outcome(written[i]) for i in range(len(shard))]


class TokenCount:
    """Notes the tokens written so far beside a progress that counts texts; until it has a rate, also the longest time left."""

    def __init__(self, bar: Progress, *, max_new_tokens: int) -> None:
        self._bar = bar
        self._most = (bar.total or 0) * max_new_tokens
        self._tokens = 0
        self._began = time.monotonic()

    def __call__(self, count: int) -> None:
        """Add tokens."""
        self._tokens += count
        rate = self._tokens / max(1e-9, time.monotonic() - self._began)
        left = "" if self._bar.rate else f"  at most {duration(max(0, self._most - self._tokens) / rate)} left"
        self._bar.note(f"{self._tokens:,} tokens  {rate:.3g} tokens/s{left}")


def continuations(
    tasks: Sequence[Task],
    target: Target,
    *,
    max_new_tokens: int,
    seed: int,
    written: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the target's continuation of each prompt; all tasks share one sampling rule.

    Every record has its own random stream, named by (seed, record id): one number a token. Prompts of different lengths are read
    one at a time if the target cannot read them together.

    Args:
        written: Called after every step with the number of new tokens.
    """
    return continued(
        [task.prompt for task in tasks],
        [target.decoder(name=target.name)],
        num_tokens=target.num_tokens,
        ends=set(target.eos_token_ids),
        sampling=tasks[0].sampling,
        limits=[max_new_tokens] * len(tasks),
        numbers_BT=torch.stack(
            [torch.rand(max_new_tokens, dtype=torch.float64, generator=stream(seed, "text", task.id)) for task in tasks]
        ),
        written=written,
        images=[task.images for task in tasks],
    )
