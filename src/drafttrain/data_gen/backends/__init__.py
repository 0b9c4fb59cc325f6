"""Backends that generate the texts of data.generate, one file a kind: built-in decoding, a server, an engine in its own environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from drafttrain.core.console import Progress
from drafttrain.core.images import Image
from drafttrain.core.registry import Registry
from drafttrain.core.texts import Sampling

if TYPE_CHECKING:
    from drafttrain.target_model import Target

backends = Registry("generation backend", "drafttrain.data_gen.backends")


@dataclass(frozen=True)
class Task:
    """One text to generate."""

    id: str
    prompt: Sequence[int]
    sampling: Sampling
    images: Sequence[Image] = ()
    """Of the prompt."""


@dataclass(frozen=True)
class Outcome:
    """The result of a task."""

    tokens: Sequence[int] | None
    """Tokens after the prompt, the end of text included; None: nothing usable."""
    reason: str = ""
    """Why there is nothing usable: a kind, a colon, a sentence."""
    account: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the manifest: `retries`; for a text also `finish`, and `ids`, the origin of its token ids: served, spelled (the text
    of each token), or text (the whole text, tokenized again). Empty: no account is written."""


@dataclass(frozen=True)
class Plan:
    """Inputs of every backend."""

    target: Target
    folder: Path
    """Folder of the shards. A backend may store answers beside them until their shard is written."""
    max_new_tokens: int
    batch_size: int
    seed: int

    def about(self) -> dict[str, Any]:
        """Return what every text depends on."""
        return {
            "target": self.target.name,
            "target_fingerprint": self.target.fingerprint,
            "tokenizer_fingerprint": self.target.tokenizer_fingerprint,
            "seed": self.seed,
            "dtype": str(self.target.model.dtype).removeprefix("torch."),
        }


class Backend(Protocol):
    """Generates texts shard by shard."""

    def content(self) -> dict[str, Any]:
        """Return the settings that the texts depend on, for the plan; empty: only what every plan holds."""
        ...

    def reproducible(self) -> dict[str, Any]:
        """Return, for the manifest, which texts the same recipe would generate again; empty: all of them."""
        ...

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard, in the order of its tasks; a shard is stored before the next one is requested."""
        ...


NOT_REPRODUCIBLE = {
    "greedy": True,
    "sampled": False,
    "why": "the engine uses its own random numbers, so the recipe's seed does not reproduce sampled texts; greedy texts are "
    "the target's, except where rounding decides between two nearly equal tokens",
}


def unusable(tokens: Sequence[int], finish: str, *, ends: Sequence[int], max_new_tokens: int) -> str:
    """Return why a text of an engine is not a valid answer to the request; empty: it is valid."""
    if finish not in ("stop", "length"):
        return f"finish_{finish or 'unknown'}: the text ended neither with an end of text nor at its length"
    if set(ends) & set(tokens[:-1]):
        return "past_end: tokens follow the end of text"
    if len(tokens) > max_new_tokens:
        return f"long: {len(tokens)} tokens, {max_new_tokens} were requested"
    if finish == "length" and len(tokens) < max_new_tokens:
        return f"short: cut after {len(tokens)} tokens, {max_new_tokens} were requested"
    return ""
