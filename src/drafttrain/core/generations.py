"""Records of decoding: forwards, rounds, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from drafttrain.core.device_time import Span


@dataclass(frozen=True)
class ForwardShape:
    """The sizes of one forward."""

    num_tokens: int
    """Query tokens over all sequences."""
    context: int
    """Cached tokens over all sequences before the call."""
    pairs: int
    """Pairs of a query token and one that it attends to, over all sequences, in each layer. A tree counts as a chain of its nodes."""
    num_sequences: int
    num_layers: int
    head_rows: int
    """Rows of logits."""

    @classmethod
    def of(cls, sizes: Sequence[int], lengths: Sequence[int], *, num_layers: int, head_rows: int) -> ForwardShape:
        """Return the shape of a call.

        Args:
            sizes: New tokens by sequence.
            lengths: Cached tokens by sequence before the call. A sequence without new tokens takes no part.
        """
        part = [(size, length) for size, length in zip(sizes, lengths, strict=True) if size]
        return cls(
            num_tokens=sum(sizes),
            context=sum(length for _, length in part),
            pairs=sum(size * length + size * (size + 1) // 2 for size, length in part),
            num_sequences=len(part),
            num_layers=num_layers,
            head_rows=head_rows,
        )

    @property
    def plain(self) -> ForwardShape:
        """The shape of plain decoding on these sequences: one token of each."""
        one = self.num_sequences
        return replace(self, num_tokens=one, pairs=self.context + one, head_rows=one)


@dataclass(frozen=True)
class Work:
    """What a forward reads and computes, from its shape and the sizes of the model."""

    weight_bytes: int = 0
    """Weights; shared ones count each time they are read. They are read once, however many tokens pass through them."""
    row_bytes: int = 0
    """Embedding rows."""
    cache_bytes: int = 0
    """Keys and values, cached and new."""
    product_flops: int = 0
    """Operations of products with weights, two for each multiply-add."""
    attention_flops: int = 0
    """Operations of attention scores and weighted sums."""

    def __add__(self, other: Work) -> Work:
        return Work(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def bytes_read(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.row_bytes + self.cache_bytes

    @property
    def flops(self) -> int:
        """All operations."""
        return self.product_flops + self.attention_flops


@dataclass(frozen=True)
class ForwardEvent:
    """One forward of one model: an entry of the evaluator's ledger."""

    model: str
    shape: ForwardShape
    work: Work
    span: Span
    """The device time of the forward."""
    prefill: bool = False
    """It reads a prompt, before the first round."""
    plain_bytes: int = 0
    """Bytes that plain decoding would have read here: one token per sequence, after the same cached tokens."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights and of the cache; shared weights count each time they are read."""
        return self.work.bytes_read

    def at(self, *, batch: int, context: int, width: float = 1.0) -> ForwardEvent:
        """Return what this forward of one sequence would be for a batch of such sequences, with other texts and numbers.

        Weights are read once for all of them; each sequence has its own cache.

        Args:
            context: Cached tokens of each sequence before the call.
            width: Bytes of a number of weights and caches, divided by those that it has here.
        """
        old, work = self.shape, self.work
        assert old.num_sequences == 1, "of several sequences the share of each is not known"
        pairs = old.pairs + old.num_tokens * (context - old.context) if old.pairs else 0
        columns = (context + old.num_tokens) / (old.context + old.num_tokens)
        return replace(
            self,
            shape=ForwardShape(
                num_tokens=batch * old.num_tokens,
                context=batch * context if old.pairs else 0,
                pairs=batch * pairs,
                num_sequences=batch,
                num_layers=old.num_layers,
                head_rows=batch * old.head_rows,
            ),
            work=Work(
                weight_bytes=round(work.weight_bytes * width),
                row_bytes=round(batch * work.row_bytes * width),
                cache_bytes=round(batch * work.cache_bytes * columns * width),
                product_flops=batch * work.product_flops,
                attention_flops=round(batch * work.attention_flops * pairs / old.pairs) if old.pairs else 0,
            ),
        )

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
    """Committed tokens: `num_accepted + 1`, or `num_accepted` after an accepted EOS or an unread leaf."""
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
