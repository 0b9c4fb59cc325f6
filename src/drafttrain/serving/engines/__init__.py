"""Serving engines that verify exports: a file for each engine, and one for the worker that runs in its environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.checkpoint import OWN_TOKENIZER, read_about
from drafttrain.core.errors import CheckpointError
from drafttrain.core.registry import Registry
from drafttrain.environments.environment import Environment, is_installed, python_of
from drafttrain.environments.known import environments_of
from drafttrain.export.convert import exporter_of

engines = Registry("serving engine", "drafttrain.serving.engines")
libraries = Registry("library", "drafttrain.serving.engines")
"""Software that loads exports and does not serve them."""


@dataclass(frozen=True)
class DecodedPrompt:
    """The output for one prompt, with the counters of its speculation; zero without a drafter."""

    tokens: Sequence[int]
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    accepted_at: Sequence[int] = ()
    """Number of rounds that accepted at least i draft tokens, i = 1, 2, ..."""
    seconds: float = 0.0
    """By the engine's own clock, from the request to its last token."""
    prompt_seconds: float = 0.0
    """Of these, those up to the first token."""
    cpu_seconds: float = 0.0
    """Time of all threads of its process meanwhile; on a shared machine it depends less on other work."""


@dataclass(frozen=True)
class Job:
    """What an engine decodes, prompt by prompt."""

    target: Path
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    temperatures: Sequence[float]
    dtype: str
    max_length: int
    """Of prompt and output in tokens, drafts past the end included."""
    lengths: Sequence[int] = ()
    """New tokens by prompt; empty: `max_new_tokens` of each."""
    as_served: bool = False
    """For its speed: after a warm-up prompt, and with the very file of the target if the engine reads it."""

    @property
    def new_tokens(self) -> list[int]:
        """Number of new tokens of each prompt."""
        return list(self.lengths) or [self.max_new_tokens] * len(self.prompts)


@dataclass(frozen=True)
class Use:
    """A drafter folder, and how an engine drafts with it."""

    folder: str
    """As the engine gets it: an absolute path, or a placeholder for one."""
    kind: str
    num_draft_tokens: int
    draft: str
    """At temperature > 0: sampled or greedy, as the engine's method `draft` returned."""


@dataclass(frozen=True)
class Conventions:
    """How an engine decodes and counts, where engines differ; the evaluator follows it in a comparison."""

    first_token_alone: bool = True
    """The first token of an output comes before any draft; else the first round drafts already."""
    drafts_past_end: bool = True
    """Rounds draft past the end of an output, and count what they accept there; else neither."""
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end a text; the text includes them."""
    draft_top_k: int = 0
    """Sampled drafts come from the k likeliest tokens of the drafter's distribution; 0: from all."""


@dataclass(frozen=True)
class CounterNames:
    """An engine's names for the counters on its /metrics page; a counter may have several label sets."""

    num_drafts: str
    num_draft_tokens: str
    num_accepted: str
    accepted_at: str
    """One for each draft position; its label `position` counts from 0."""
    num_requests: str
    """Requests that ended, of all clients."""
    num_tokens: str
    """New tokens of all requests."""


class Loader(ABC):
    """Software of others that loads exported drafters, in an environment of its own."""

    environment: ClassVar[Environment]
    worker: ClassVar[Path]
    """The file that runs in the environment to verify an export."""
    formats: ClassVar[tuple[str, ...]]
    """Export formats that it loads; the first is the one to use."""
    methods: ClassVar[Mapping[str, str]]
    """The kinds of drafter that it runs, and its own name for each."""

    @property
    def name(self) -> str:
        """Its name, which is that of its environment."""
        return self.environment.name

    def formats_for(self, kind: str | None) -> tuple[str, ...]:
        """Return the formats in which it loads this kind of drafter; the first is the one to use. None: any kind."""
        if kind is None:
            return self.formats
        return tuple(name for name in self.formats if exporter_of(name).reads.get(kind, "drafttrain") != "drafttrain")


class ServingEngine(Loader):
    """One engine: its requests, its answers, and how it counts."""

    samples: ClassVar[bool] = True
    """It also runs at temperature > 0; else its answer holds the greedy run only."""
    counters: ClassVar[CounterNames | None] = None
    """The counters of its server; None: it has none that can be read."""

    def check_kind(self, folder: Path, kind: str) -> None:
        """Check that this engine can run a kind of drafter, with the target's tokenizer.

        Raises:
            CheckpointError: It cannot; names the kinds that it runs, and the engines that run this kind.
        """
        about = read_about(folder)
        if about is not None and about.own_tokenizer:
            raise CheckpointError(f"{folder}: {self.name} cannot run it: {OWN_TOKENIZER}")
        if kind in self.methods:
            return
        able = [name for name in engines.names() if kind in engine_of(name).methods]
        raise CheckpointError(
            f"{folder}: {self.name} runs no drafter of kind {kind}, only {', '.join(self.methods)}. "
            f"Engines for {kind}: {', '.join(able) or 'none; use drafttrain eval'}"
        )

    @abstractmethod
    def draft(self, kind: str, wanted: str) -> str:
        """Return how it drafts at temperature > 0: `sampled` or `greedy`; as wanted if it can."""

    def conventions(self, target: Path) -> Conventions:
        """Return how it decodes and counts with a target."""
        return Conventions()

    def target_as(self, folder: Path, dtype: str | None = None) -> Path:
        """Return what it loads as the target: the folder, or files converted from it."""
        return folder

    @abstractmethod
    def request(self, job: Job, use: Use | None) -> dict[str, Any]:
        """Return the request of a job; use None: by the target alone."""

    @abstractmethod
    def decoded(self, answer: Mapping[str, Any]) -> list[list[DecodedPrompt]]:
        """Return the outputs in an answer: by temperature, then by prompt."""

    @abstractmethod
    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return why this engine cannot run a drafter whose files are in order."""

    def misread(self, drafter: Path, kind: str) -> list[str]:
        """Return why this engine would misread a drafter, on any device."""
        return []

    @abstractmethod
    def command(self, target: str, use: Use) -> str:
        """Return the command line that serves a target with a drafter."""


def engine_of(name: str) -> ServingEngine:
    """Return the engine of a name.

    Raises:
        KeyError: No engine has this name.
    """
    engine: ServingEngine = engines.entry(name).component()
    return engine


def table_rows() -> list[list[str]]:
    """Return a row for every environment: its name, pins, kinds, formats, and where it is installed."""
    rows = []
    for environment in environments_of([]):
        name = environment.name
        registry = next((one for one in (engines, libraries) if name in one.names()), None)
        loader: Loader | None = registry.entry(name).component() if registry else None
        methods, formats = (loader.methods, loader.formats) if loader else ({}, ())
        where = str(python_of(environment).parents[1]) if is_installed(environment) else "not installed"
        rows.append([name, " ".join(environment.pins) or "none", " ".join(methods), " ".join(formats), where])
    return rows
