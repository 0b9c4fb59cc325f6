"""Who writes the texts of data.generate, one file a kind: drafttrain's own decoding, a server, an engine in its own environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from drafttrain.core.console import Progress
from drafttrain.core.registry import Registry
from drafttrain.core.texts import Sampling

if TYPE_CHECKING:
    from drafttrain.target_model import Target

backends = Registry("generation backend", "drafttrain.data_gen.backends")


@dataclass(frozen=True)
class Task:
    """One text to write."""

    id: str
    prompt: Sequence[int]
    sampling: Sampling


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    tokens: Sequence[int] | None
    """What was written after the prompt, its end included; None: nothing that can be used."""
    reason: str = ""
    """Why there is nothing: a kind, a colon, a sentence."""
    account: Mapping[str, Any] = field(default_factory=dict)
    """What there is to tell of it; empty: nothing, and no account is written. `retries`; of a text also `finish`, and `ids`, which
    says where its token ids are from: served, spelled (one by one), or text (tokenised again)."""


@dataclass(frozen=True)
class Plan:
    """What every backend is told."""

    target: Target
    folder: Path
    """Of the shards. A backend may keep answers beside them until their shard is stored."""
    max_new_tokens: int
    batch_size: int
    seed: int


class Backend(Protocol):
    """Writes texts shard by shard."""

    def content(self) -> dict[str, Any]:
        """Return the settings that the texts depend on, as a plan names them; empty: nothing but what every plan names."""
        ...

    def reproducible(self) -> dict[str, Any]:
        """Return which texts the same recipe would write again, for the manifest; empty: all of them."""
        ...

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard, in the order of its tasks; the last one is stored when the next is asked for."""
        ...


NOT_REPRODUCIBLE = {
    "greedy": True,
    "sampled": False,
    "why": "the engine draws by its own random numbers: the seed of the recipe does not give the sampled texts again; greedy "
    "ones are the target's own but for rounding, which moves a token where two are as good as equal",
}


def unusable(tokens: Sequence[int], finish: str, *, ends: Sequence[int], max_new_tokens: int) -> str:
    """Return why what an engine wrote is not what the target would have been asked for; empty: it is."""
    if finish not in ("stop", "length"):
        return f"finish_{finish or 'unknown'}: the text ended otherwise than by its end or by its length"
    if set(ends) & set(tokens[:-1]):
        return "past_end: there are tokens after the end of the text"
    if len(tokens) > max_new_tokens:
        return f"long: {len(tokens)} tokens, {max_new_tokens} were asked for"
    if finish == "length" and len(tokens) < max_new_tokens:
        return f"short: cut after {len(tokens)} tokens, {max_new_tokens} were asked for"
    return ""
