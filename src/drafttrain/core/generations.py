"""What decoding recorded: forwards, rounds, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drafttrain.core.device_time import Span


@dataclass(frozen=True)
class ForwardEvent:
    """One forward of one model: an entry of the evaluator's ledger."""

    model: str
    num_tokens: int
    """Query tokens over all sequences."""
    context: int
    """Cached tokens over all sequences before the call."""
    num_sequences: int
    num_layers: int
    bytes_read: int
    """Weights, shared ones each time they are read, and cache."""
    span: Span
    """When the device was at it."""
    prefill: bool = False
    """Reads a prompt, before the first round."""
    plain_bytes: int = 0
    """What a plain call would have read here: one token a sequence, after the same cached tokens."""

    @property
    def seconds(self) -> float:
        """How long the device was at it; waits for the device, so ask when the decoding is over."""
        return self.span.seconds


# ---------------------------------------------------------------- what decoding leaves behind


@dataclass(frozen=True)
class Round:
    """One proposal, one target call, one verdict, in counts."""

    start: int
    """Tokens of the generation before this round: the round's first emitted token is `tokens[start]`."""
    num_draft_tokens: int
    """Nodes drafted, the root not counted."""
    max_depth: int
    """Depth of the deepest node that was drafted; for a chain, the same number."""
    num_accepted: int
    """Draft tokens kept, counted after the cut by EOS or length."""
    num_emitted: int
    """Tokens committed: `num_accepted + 1`, or `num_accepted` when an accepted EOS ended the text."""
    reason: str
    """reject, leaf, eos or length."""


@dataclass(frozen=True)
class Generation:
    """One prompt's output and how it came about."""

    id: str
    domain: str
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    """The new tokens, an ending EOS included; the same as all rounds' emitted tokens in order."""
    rounds: Sequence[Round]
    prefill_seconds: float
    """Reading the prompt, target and drafter; this sequence's share when several are decoded together."""
    draft_seconds: float
    """Proposing and keeping the proposer's cache; this sequence's share."""
    verify_seconds: float
    """Target calls of the rounds, their verdicts, keeping the target's cache; this sequence's share."""
    seconds: float
    """From before the prefill to the end, everything; this sequence's share. Decoding alone: less `prefill_seconds`."""
