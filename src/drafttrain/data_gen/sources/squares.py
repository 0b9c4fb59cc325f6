"""Pictures of four coloured squares and what they show: a task for a model that reads images and has a hundred thousand weights."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image as Picture

from drafttrain.core.random import stream_seed
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 50),
    "black": (25, 25, 25),
    "white": (240, 240, 240),
}
PLACES = ("left", "right")
ROWS = ("top", "bottom")
PLACEHOLDER = "<image>"
ASKED = "say what is here :"
SHOWS = ("is", "shows", "has")
"""Synonyms: one is drawn for each answer."""
JITTER = 20
"""Largest change of a channel of a square's colour."""
SIDE = 14
"""Pixels of a square's side."""
VOCABULARY = (*COLOURS, *PLACES, *ROWS, *SHOWS, *ASKED.split(), "the", ".", "and")
"""All words of the task; spaces separate them."""


@dataclass(kw_only=True)
class SquaresSettings(WeightedSettings):
    """Four coloured squares, in a picture or named in words, and a description that names them by their places."""

    num_records: int = setting(2000, help="Number of records.", ge=1)
    images: bool = setting(True, help="Show a picture; false: name the colours in words.")
    split: Literal["train", "held_out"] = setting(
        "train", help="Side of the split: one combination of colours in ten is held out."
    )
    seed: int = setting(0, help="Seed of the colours and the words.", ge=0)

    def smoke(self) -> SquaresSettings:
        """Return a copy with a few records."""
        return replace(self, num_records=min(self.num_records, 40))


@sources.register("squares", SquaresSettings)
class Squares:
    """Record i is a pure function of (seed, i)."""

    def __init__(self, settings: SquaresSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every record."""
        kind = "picture" if self.settings.images else "words"
        for number in range(self.settings.num_records):
            rng = random.Random(stream_seed(self.settings.seed, "squares", kind, number))
            names = self._colours(rng)
            id = f"squares:{kind}:{self.settings.split}:{self.settings.seed}:{number}"
            shown = PLACEHOLDER if self.settings.images else " ".join(names)
            value = {"id": id, "prompt": f"{shown} {ASKED}", "completion": description(names, rng=rng), "chat": False}
            if self.settings.images:
                content = picture(names, rng=rng)
                value["images"] = [{"bytes": base64.b64encode(content).decode()}]
            yield Item(id, value)

    def _colours(self, rng: random.Random) -> list[str]:
        """Draw four colours until they belong to this side of the split."""
        while True:
            names = rng.choices(list(COLOURS), k=4)
            if (stream_seed(0, "squares split", *names) % 10 == 0) == (self.settings.split == "held_out"):
                return names


def description(names: Sequence[str], *, rng: random.Random) -> str:
    """Return `the top left is red and the top right is blue . the bottom left ...`."""
    shows = rng.choice(SHOWS)
    halves = []
    for row, first in zip(ROWS, (0, 2), strict=True):
        places = [f"the {row} {place} {shows} {names[first + n]}" for n, place in enumerate(PLACES)]
        halves.append(f"{' and '.join(places)} .")
    return " ".join(halves)


def picture(names: Sequence[str], *, rng: random.Random) -> bytes:
    """Return a picture of four squares as PNG, each slightly off its colour."""
    drawn = Picture.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, name in enumerate(names):
        colour = tuple(min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in COLOURS[name])
        drawn.paste(
            colour, (SIDE * (number % 2), SIDE * (number // 2), SIDE * (number % 2 + 1), SIDE * (number // 2 + 1))
        )
    written = io.BytesIO()
    drawn.save(written, format="PNG")
    return written.getvalue()
