"""The target with one cache entry a segment: `CachedLM`'s interface, so the evaluator's loop decodes with it.

The distribution that it serves: p(x | text) = the target's, reading the complete segments of the text, one entry each, then the
tokens of the open segment merged into one more entry. Tokens of the prompt are segments of one token. Where a segment of new text
ends is decided by the stop head from that text alone, never by what was drafted or rejected. So p is a function of prompt and text,
and verification keeps it exactly.

N = nodes, V = vocabulary, D = hidden, F = tapped states
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.images import Image
from drafttrain.core.proposals import LayerState
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.weights import weights_of
from drafttrain.drafters.hamburger.embedder import SegmentEmbedder
from drafttrain.drafters.hamburger.micro_decoder import MicroDecoder
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.logits import head_logits
from drafttrain.target_model.part import Part
from drafttrain.target_model.ragged_cache import RaggedCache, Tree


@dataclass(frozen=True)
class ReadingParts:
    """What a target reads segments with."""

    embedder: SegmentEmbedder
    micro: MicroDecoder
    taps: tuple[int, ...]
    """The states that the micro decoder reads, by the block that they enter."""
    continue_above: float
    """A segment goes on where the stop head gives it this probability."""

    @property
    def size(self) -> int:
        """Most tokens of a segment."""
        return self.embedder.size


@dataclass
class _Sequence:
    """Where one sequence is."""

    num_tokens: int
    """In complete segments."""
    in_prompt: bool = True
    """The next token that is read is the prompt's last one: a segment of one token."""
    open: list[int] = field(default_factory=list)
    """Tokens of the open segment, without the root."""
    macro_FD: Tensor | None = None
    """The tapped states after the last complete segment of the last call; None: it is in the prompt."""
    goes_on: dict[tuple[int, ...], bool] = field(default_factory=dict)
    """Decisions of the stop head about beginnings of the open segment."""
    paths: list[list[int]] = field(default_factory=list)
    """By node of the last call, the tokens from the root to it."""
    seen: TargetOutput = field(default_factory=TargetOutput)
    """Of the last call."""


class MergedLM(CachedLM):
    """A `CachedLM` that reads every node as the merged open segment up to it, and keeps one entry for each complete segment.

    Nodes do not attend to each other: each is another beginning of the same segment. So a proposal must stay within the segment.
    """

    def __init__(self, model: Any, parts: ReadingParts, *, name: str, listener: ForwardListener | None = None) -> None:
        super().__init__(model, name=name, listener=listener)
        self._parts = parts
        self._sequences: list[_Sequence] = []
        self._micro_weights = weights_of(parts.micro)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        needs: TargetNeeds | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[TargetOutput]:
        """Empty the cache and read these prompts in one call, an entry for each token.

        Raises:
            CheckpointError: Positions are given: entries are counted, not placed. Or a prompt has images.
        """
        if images is not None and any(images):
            raise CheckpointError(f"{self.name}: reads prompts of text only, and a prompt has images")
        if positions is not None:
            raise CheckpointError(f"{self.name}: reads whole prompts only, not the part of one that was kept")
        self._sequences = [_Sequence(len(prompt)) for prompt in prompts]
        return super().begin(prompts, needs=needs)

    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None = None,
        needs: TargetNeeds | None = None,
        prefill: bool = False,
        resume: Sequence[LayerState | None] | None = None,
        embedded: Sequence[Tensor] | None = None,
    ) -> list[TargetOutput]:
        """Read nodes; return the requested outputs of each.

        Raises:
            CheckpointError: A node is beyond the open segment.
        """
        if prefill:
            return super().forward(tokens, needs=needs, prefill=True)
        for sequence, nodes, tree in zip(
            self._sequences, tokens, parents or [range(-1, len(one) - 1) for one in tokens], strict=True
        ):
            sequence.paths = _paths(nodes, tree)
        self._check_within_segments()
        rows = [[*one.open, *path] for one in self._sequences for path in one.paths]
        entering = self._merged(rows).split([len(one.paths) for one in self._sequences])
        seen = super().forward(
            tokens,
            parents=[[-1] * len(one.paths) for one in self._sequences],
            needs=(needs or TargetNeeds(logits=True)) | TargetNeeds(hidden=self._parts.taps),
            embedded=entering,
        )
        for sequence, output in zip(self._sequences, seen, strict=True):
            # Without logits, which would be kept through the next call.
            sequence.seen = replace(output, logits_BTV=None)
        return seen

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Add these nodes (a path down the tree) to the open segment of each sequence; keep an entry if it is complete now."""
        segments = [
            [*one.open, *(one.paths[path[-1]] if path else [])]
            for one, path in zip(self._sequences, nodes, strict=True)
        ]
        goes_on = self.goes_on(segments)
        kept: list[list[int]] = []
        for one, path, segment, more in zip(self._sequences, nodes, segments, goes_on, strict=True):
            complete = bool(path) and not more
            kept.append([path[-1]] if complete else [])
            one.open = segment
            if complete:
                states = [one.seen.hidden_BTD[index][0, path[-1]] for index in self._parts.taps]
                one.macro_FD = torch.stack(states)
                one.num_tokens += len(segment)
                one.open, one.in_prompt = [], False
                one.goes_on = {}
        super().keep(kept)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        self._sequences = [self._sequences[i] for i in keep]
        super().drop(keep)

    def open_segments(self) -> list[list[int]]:
        """Return the tokens of each open segment, without the root."""
        return [list(one.open) for one in self._sequences]

    def room(self, sequence: int | _Sequence) -> int:
        """Return how many draft tokens the open segment has room for after the root."""
        one = self._sequences[sequence] if isinstance(sequence, int) else sequence
        return 0 if one.in_prompt else self._parts.size - len(one.open) - 1

    def goes_on(self, segments: Sequence[Sequence[int]]) -> list[bool]:
        """Return, by sequence, whether the next token belongs to the open segment, if that begins with these tokens."""
        return self._go_on(list(enumerate(segments)))

    def _go_on(self, beginnings: Sequence[tuple[int, Sequence[int]]]) -> list[bool]:
        """Return, by (sequence, beginning of its open segment), whether the next token belongs to that segment."""
        asked = {
            number: segment
            for number, segment in beginnings
            if segment
            and not (one := self._sequences[number]).in_prompt
            and len(segment) < self._parts.size
            and tuple(segment) not in one.goes_on
        }
        if asked:
            self._look(list(asked), list(asked.values()), drafting=False)
        return [self._sequences[number].goes_on.get(tuple(segment), False) for number, segment in beginnings]

    def _check_within_segments(self) -> None:
        """Refuse a draft token whose parent ends the segment: what the call would compute there is no part of p."""
        longest = max((len(path) for one in self._sequences for path in one.paths), default=0)
        for depth in range(2, longest + 1):
            for number, one in enumerate(self._sequences):
                before = {tuple(path[:-1]) for path in one.paths if len(path) == depth}
                if not all(self._go_on([(number, [*one.open, *path])])[0] for path in before):
                    raise CheckpointError(
                        f"{self.name} in segments of at most {self._parts.size} tokens: a draft ends with its segment; decode with "
                        "proposers that draft within one (kind hamburger)"
                    )

    def micro_states(self, sequences: Sequence[int], segments: Sequence[Sequence[int]]) -> Tensor:
        """Return states_ND of the micro decoder at the last token of each beginning of an open segment.

        Args:
            sequences: The number of each one's sequence, which has left its prompt.
        """
        return self._look(sequences, segments, drafting=True)

    @torch.no_grad()
    def _look(self, sequences: Sequence[int], segments: Sequence[Sequence[int]], *, drafting: bool) -> Tensor:
        """Run the micro decoder; store what the stop head decides.

        Args:
            drafting: The call drafts. Otherwise only the target needs to know where a segment ends.
        """
        span, micro = Span(self.device), self._parts.micro
        macros = [macro for number in sequences if (macro := self._sequences[number].macro_FD) is not None]
        tokens = [token for segment in segments for token in segment]
        macro_of, places = zip(
            *((row, place) for row, one in enumerate(segments) for place in range(len(one))), strict=True
        )
        ends = [sum(map(len, segments[: row + 1])) - 1 for row in range(len(segments))]
        # One copy to the device for all.
        packed_4N = torch.tensor([tokens, macro_of, places, [*ends, *[0] * (len(tokens) - len(ends))]]).to(self.device)
        embedded_ND = self.model.get_input_embeddings()(packed_4N[0])
        states_ND = micro(torch.stack(macros), embedded_ND, packed_4N[1], packed_4N[2])
        states_ND = states_ND[packed_4N[3, : len(ends)]]
        chances = torch.sigmoid(micro.goes_on(states_ND).float()).tolist()
        for number, segment, chance in zip(sequences, segments, chances, strict=True):
            on = len(segment) < self._parts.size and chance >= self._parts.continue_above
            self._sequences[number].goes_on[tuple(segment)] = on
        if self.listener is not None:
            rows = len(tokens) + len(macros) * len(self._parts.taps)
            sizes = [len(segment) + len(self._parts.taps) for segment in segments]
            shape = ForwardShape.of(sizes, [0] * len(sizes), num_layers=len(micro.layers), head_rows=len(segments))
            work = self._micro_weights.read(rows)
            if drafting:
                self.listener(ForwardEvent("drafter", shape, work, span.end()))
            else:
                # Its time is in the rest of verification: it is neither drafting nor a part of the target's call.
                self.listener(ForwardEvent(f"{self.name}'s stop head", shape, work, Span.of(0.0)))
        return states_ND

    def micro_logits(self, states_ND: Tensor) -> Tensor:
        """Return logits_NV of the token after each micro state."""
        return head_logits(self.model, states_ND.to(self.model.dtype))

    @torch.no_grad()
    def _merged(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return what is read for the beginnings of segments."""
        size = self._parts.size
        back_NS = torch.tensor([[*reversed(row), *[0] * (size - len(row))] for row in rows])
        place_N1 = torch.tensor([[len(row) - 1] for row in rows])
        packed = torch.cat([back_NS, place_N1], dim=1).to(self.device)
        embedded_NSD = self.model.get_input_embeddings()(packed[:, :size])
        entering_ND: Tensor = self._parts.embedder(embedded_NSD, packed[:, size]).to(self.model.dtype)
        return entering_ND

    def _event(self, shape: ForwardShape, part: Part, *, prefill: bool, span: Span) -> ForwardEvent:
        """Return the event of a call. Plain decoding also reads the micro decoder: its stop head judges every token."""
        event = super()._event(shape, part, prefill=prefill, span=span)
        return replace(event, plain_bytes=event.plain_bytes + self._micro_weights.num_bytes)

    def _positions(self, cache: RaggedCache, sizes: Sequence[int], trees: Sequence[Tree | None]) -> Tensor:
        """Return the position of every node: that of its token in the text, not of its entry in the cache."""
        if not any(one.paths for one in self._sequences):
            return super()._positions(cache, sizes, trees)
        rows = [[one.num_tokens + len(one.open) + len(path) - 1 for path in one.paths] for one in self._sequences]
        return torch.tensor([[*row, *[0] * (max(sizes) - len(row))] for row in rows])


def _paths(nodes: Sequence[int], parents: Tree) -> list[list[int]]:
    """Return the tokens from the root to each node."""
    found: list[list[int]] = []
    for token, parent in zip(nodes, parents, strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found
