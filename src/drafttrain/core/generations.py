"""Records of decoding: forwards, rounds, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Bytes of weights and of the cache; shared weights count each time they are read."""
    span: Span
    """The device time of the forward."""
    prefill: bool = False
    """It reads a prompt, before the first round."""
    plain_bytes: int = 0
    """Bytes that plain decoding would have read here: one token per sequence, after the same cached tokens."""

    @property
    def seconds(self) -> float:
        """Device time. Reading it waits for the device, so read it after decoding."""
        return self.span.seconds


@dataclass(frozen=True)
class Round:
    """One proposal, one target call, one verdict, in counts."""

    start: int
    """Tokens of the generation before this round: the round's first emitted token is `tokens[start]`."""
    num_draft_tokens: int
    """Nodes drafted, without the root."""
    max_depth: int
    """Depth of the deepest drafted node; for a chain, the same as `num_draft_tokens`."""
    num_accepted: int
    """Accepted draft tokens, after the cut by EOS or length."""
    num_emitted: int
    """Committed tokens: `num_accepted + 1`, or `num_accepted` if an accepted EOS ended the text."""
    reason: str
    """reject, leaf, eos or length."""


@dataclass(frozen=True)
class Generation:
    """One prompt's output, its rounds and its times."""

    id: str
    domain: str
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    """The new tokens, including a final EOS: the emitted tokens of all rounds, in order."""
    rounds: Sequence[Round]
    prefill_seconds: float
    """Reading the prompt, target and drafter. Times are this sequence's share if several are decoded together."""
    draft_seconds: float
    """Proposing, and updating the proposer's cache."""
    verify_seconds: float
    """Target calls of the rounds, their verdicts, and updating the target's cache."""
    seconds: float
    """From before the prefill to the end. Subtract `prefill_seconds` for decoding alone."""
