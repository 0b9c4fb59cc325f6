"""What a kind of cascade implements: who writes the next span, whether it stays, and how it is moved between its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.cascade.spans import CascadeGeneration, Span, Unit, Written
from drafttrain.eval.cascade.text_reader import TextReader
from drafttrain.target_model import Target


@dataclass(frozen=True)
class Pair:
    """The two models, and how they write."""

    target: Target
    """The large one."""
    small: Any
    """A Hugging Face causal LM that reads and writes the target's tokens."""
    sampling: Sampling
    max_new_tokens: int
    seed: int = 0
    draft: Any = None
    """Settings of a length policy: the small model drafts for the large one's spans, without loss; None: it does not."""
    stop_tokens: Sequence[int] | None = None
    """Tokens that end a text; None: the target's own."""


class Decoder(Protocol):
    """Writes texts with two models."""

    def generate(self, prompt: Prompt) -> CascadeGeneration:
        """Continue a prompt."""
        ...


class CascadeSettings:
    """Base class of the settings of all kinds."""

    swept: ClassVar[str]
    """The setting that moves it between the models."""
    values: ClassVar[Sequence[float]]
    """Of that setting, for a frontier where nothing else is asked for."""
    drafts: ClassVar[bool] = True
    """The large model's spans may be drafted: several tokens come at once."""

    @property
    def unit(self) -> Unit:
        """What is routed as one: random routing draws the writer of each."""
        raise NotImplementedError

    def why_no_draft(self, draft: Any) -> str | None:
        """Return why this length policy cannot draft for the large model's spans; None: it can, or it is null."""
        if draft is None:
            return None
        if not self.drafts:
            return f"{self.kind} needs each token as it is written: set draft: null"  # type: ignore[attr-defined]
        return f"{draft.kind} is a tree: use one that drafts chains" if getattr(draft, "most_children", 1) > 1 else None

    def at(self, value: float) -> Any:
        """Return a copy with another value of the swept setting."""
        return replace(self, **{self.swept: value})  # type: ignore[type-var]


class Router:
    """Base class of kinds that decode with the engine of cascades; by default every span stays."""

    reads_entropies: ClassVar[bool] = False
    """`Written.entropies` are needed."""

    def begin(self, generator: torch.Generator) -> None:
        """Start a new text.

        Args:
            generator: For decisions of its own.
        """
        raise NotImplementedError

    def next(self) -> Span:
        """Return who writes the next span."""
        raise NotImplementedError

    def judged(self, written: Written, large: TextReader) -> float | None:
        """Return the score of a span of the small model; None: it stays unjudged."""
        return None

    def stays(self, score: float) -> bool:
        """Return whether a span with this score stays; otherwise the large model writes it again."""
        return True

    def observe(self, written: Written) -> None:
        """Update from a span that stays."""
