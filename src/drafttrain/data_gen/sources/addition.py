"""Additions with written steps: a checkable task that a model of a hundred thousand parameters learns in minutes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from drafttrain.core.random import stream_seed
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources

WORDINGS = {
    "and": ("and", "plus", "with"),
    "make": ("make", "give", "reach"),
    "so": (",", ";", "so"),
    "put": ("put", "write", "note"),
    "carry": ("carry", "keep", "hold"),
}
"""Synonyms: one is drawn each time, and no answer depends on it."""

ANSWER = "answer"

VOCABULARY = (
    *map(str, range(10)),
    "+",
    "=",
    ".",
    *(word for words in WORDINGS.values() for word in words),
    ANSWER,
)
"""All words of the task; spaces separate them."""


@dataclass(kw_only=True)
class AdditionSettings(WeightedSettings):
    """Additions, each solved digit by digit in varying words: prompt, completion, and answer."""

    num_records: int = setting(4000, help="Number of problems.", ge=1)
    num_digits: int = setting(2, help="Digits of both numbers.", ge=1, le=9)
    split: Literal["train", "held_out"] = setting(
        "train", help="Side of the split: one pair of numbers in ten is held out."
    )
    seed: int = setting(0, help="Seed of the numbers and the words.", ge=0)

    def smoke(self) -> AdditionSettings:
        """Return a copy with a few problems."""
        return replace(self, num_records=min(self.num_records, 40))


@sources.register("addition", AdditionSettings)
class Addition:
    """Problem i is a pure function of (seed, i)."""

    def __init__(self, settings: AdditionSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every problem."""
        for number in range(self.settings.num_records):
            rng = random.Random(stream_seed(self.settings.seed, "addition", number))
            first, second = self._numbers(rng)
            id = f"addition:{self.settings.split}:{self.settings.seed}:{number}"
            value = {
                "id": id,
                "prompt": problem(first, second, num_digits=self.settings.num_digits),
                "completion": solution(first, second, num_digits=self.settings.num_digits, rng=rng),
                "answer": str(first + second),
                "chat": False,
            }
            yield Item(id, value)

    def _numbers(self, rng: random.Random) -> tuple[int, int]:
        """Draw two numbers until they belong to this side of the split."""
        while True:
            first, second = (rng.randrange(10**self.settings.num_digits) for _ in range(2))
            if (stream_seed(0, "addition split", first, second) % 10 == 0) == (self.settings.split == "held_out"):
                return first, second


def problem(first: int, second: int, *, num_digits: int) -> str:
    """Return `4 7 + 8 5 =`."""
    return " ".join([*f"{first:0{num_digits}d}", "+", *f"{second:0{num_digits}d}", "="])


def solution(first: int, second: int, *, num_digits: int, rng: random.Random) -> str:
    """Return the steps from the last digit to the first, then the answer: `7 and 5 and 0 make 1 2 , put 2 carry 1 . ...`."""
    words: list[str] = []
    carry, digits = 0, ""
    for place in reversed(range(num_digits)):
        one, other = (int(f"{number:0{num_digits}d}"[place]) for number in (first, second))
        total = one + other + carry
        word = {meaning: rng.choice(choices) for meaning, choices in WORDINGS.items()}
        joined = [str(one), word["and"], str(other), word["and"], str(carry), word["make"], *f"{total:02d}"]
        words += [*joined, word["so"], word["put"], str(total % 10), word["carry"], str(total // 10), "."]
        carry, digits = total // 10, str(total % 10) + digits
    return " ".join([*words, ANSWER, *f"{carry}{digits}"])
