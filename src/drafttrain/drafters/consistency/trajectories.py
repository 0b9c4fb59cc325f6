"""Jacobi trajectories of the target on the labels of texts: the iterates y^0 .. y^n of every block of n tokens.

T = tokens of a text, C = n + 1 iterates, N = rows, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np

from drafttrain.core.altered_text import Alteration
from drafttrain.core.errors import DataError
from drafttrain.core.probability import likeliest
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Record
from drafttrain.drafters.text_notes import Notes, TextNotes
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM

NOTHING = -1
"""Beside a token that is in no block."""


class Trajectories(TextNotes):
    """Column j beside a token of a block is its token in iterate j; the last column is the fixed point.

    The first iterate is drawn from the prompt. Blocks follow the text itself, so in a text that the target wrote greedily every fixed
    point is the text.

    Args:
        block: Tokens of a block, n.
        mixed_labels: A fixed point that differs from the text in more than this share of its tokens is replaced by the text as the
            label; None: only blocks whose fixed point is the text are trained.

    Source: Kou et al. 2024, Consistency Large Language Models, arXiv 2403.00835, 3.1; mixed labels: Song et al. 2025, CEED-VLA,
    arXiv 2506.13725.
    """

    name: ClassVar[str] = "trajectories"

    def __init__(self, block: int, mixed_labels: float | None = None) -> None:
        self.block = block
        self.mixed_labels = mixed_labels

    @property
    def columns(self) -> int:
        """The iterates: n updates reach the fixed point."""
        return self.block + 1

    def about(self) -> dict[str, Any]:
        """Return the length of a block."""
        return {"block": self.block}

    def of(self, records: Sequence[Record], target: Target, *, seed: int) -> list[Notes]:
        """Return the trajectories of all blocks; texts that the target cannot read together are read one by one."""
        lm = CachedLM(target.model, name="target")
        longest = max(len(record.tokens) for record in records)
        if len(records) > 1 and lm.why_one_at_a_time(longest + self.block):
            return [notes for record in records for notes in self.of([record], target, seed=seed)]
        found: list[Notes] = [np.full((len(one.tokens), self.columns), NOTHING, np.int32) for one in records]
        left = [blocks_of(record.loss_mask, self.block) for record in records]
        lm.begin([record.tokens[:-1] for record in records])
        while any(left):
            # From the last block of a text to its first: the cache holds what is before.
            spans = [blocks.pop() if blocks else None for blocks in left]
            lm.cut([length if one is None else one.start - 1 for one, length in zip(spans, lm.lengths, strict=True)])
            for notes_TC, span, iterates in zip(
                found, spans, self._iterates(lm, records, spans, target, seed), strict=True
            ):
                if span is not None:
                    notes_TC[span.start : span.stop] = np.array(iterates, np.int32).T
        return found

    def _iterates(
        self, lm: CachedLM, records: Sequence[Record], spans: Sequence[range | None], target: Target, seed: int
    ) -> list[list[list[int]]]:
        """Return all iterates of a block of each text; the cache holds the tokens before the one that the block follows."""
        guesses = [
            [] if span is None else _from_prompt(record, span, seed)
            for record, span in zip(records, spans, strict=True)
        ]
        roots = [
            [] if span is None else [record.tokens[span.start - 1]] for record, span in zip(records, spans, strict=True)
        ]
        iterates = [[guess] for guess in guesses]
        for _ in range(self.block):
            seen = lm.forward([[*root, *guess] for root, guess in zip(roots, guesses, strict=True)])
            lm.keep([[] for _ in records])
            new = []
            for output, guess in zip(seen, guesses, strict=True):
                if output.logits_BTV is None or not guess:
                    new.append(guess)
                    continue
                new.append(likeliest(output.logits_BTV[0, : len(guess), : target.num_tokens]).tolist())
            done = new == guesses
            guesses = new
            for trajectory, guess in zip(iterates, guesses, strict=True):
                trajectory.append(guess)
            if done:
                break
        return [[*one, *[one[-1]] * (self.columns - len(one))] for one in iterates]

    def altered(self, record: Record, notes_TC: Notes, *, seed: int) -> Alteration:
        """Return the text with one random block as one of its iterates before the label; nothing where no block is trained."""
        random = Random(seed)
        trained = [
            one for span in blocks_of(record.loss_mask, self.block) if (one := self._trained(record, notes_TC, span))
        ]
        if not trained:
            return Alteration(record.tokens, record.tokens, [])
        span, label, iterates = random.choice(trained)
        iterate = random.choice(iterates)
        first = span.start + _first_difference(iterate, label)
        before, after = list(record.tokens[: span.start]), list(record.tokens[span.stop :])
        return Alteration([*before, *label, *after], [*before, *iterate, *after], range(first, span.stop - 1))

    def _trained(self, record: Record, notes_TC: Notes, span: range) -> tuple[range, list[int], list[list[int]]] | None:
        """Return (block, label, iterates that are mapped to it); None: the block is not trained."""
        text = list(record.tokens[span.start : span.stop])
        iterates: list[list[int]] = notes_TC[span.start : span.stop].T.tolist()
        fixed = iterates[-1]
        label = self._label(fixed, text)
        if label is None:
            return None
        # After the fixed point nothing changes. A state predicts the next token: a difference in the last one alone teaches nothing.
        different = [one for one in iterates if _first_difference(one, label) < len(label) - 1]
        moving = [one for number, one in enumerate(different) if number == 0 or one != different[number - 1]]
        return (span, label, moving) if moving else None

    def _label(self, fixed: list[int], text: list[int]) -> list[int] | None:
        if fixed == text:
            return fixed
        if self.mixed_labels is None:
            return None
        differing = sum(a != b for a, b in zip(fixed, text, strict=True)) / len(text)
        return text if differing > self.mixed_labels else fixed

    def summary(self, records: Sequence[Record], notes: Sequence[Notes]) -> str:
        """Return how many blocks are trained, and in how many updates they converged.

        Raises:
            DataError: None can be trained.
        """
        every = trained = updates = tokens = 0
        for record, notes_TC in zip(records, notes, strict=True):
            for span in blocks_of(record.loss_mask, self.block):
                every += 1
                if self._trained(record, notes_TC, span):
                    trained += 1
                    tokens += len(span)
                    updates += num_updates(notes_TC[span.start : span.stop].T.tolist())
        if not trained:
            raise DataError(
                f"trajectories: none of {every:,} blocks of {self.block} tokens ends in the text that it is a part of. Train on texts "
                "that the target writes itself, greedily (data.generate.temperatures: [0]), or set drafter.mixed_labels"
            )
        return (
            f"trajectories: {trained:,} of {every:,} blocks of up to {self.block} tokens are trained; {tokens / updates:.2f} tokens an "
            "update of the target as it is"
        )


def blocks_of(loss_mask: Sequence[bool], size: int) -> list[range]:
    """Return blocks of `size` successive labels, the last of each run of labels may be shorter; none of a single token."""
    labels = [place for place, trained in enumerate(loss_mask) if trained and place > 0]
    runs: list[list[int]] = []
    for place in labels:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    blocks = [
        range(start, min(start + size, run[-1] + 1)) for run in runs for start in range(run[0], run[-1] + 1, size)
    ]
    return [block for block in blocks if len(block) > 1]


def num_updates(iterates: Sequence[Sequence[int]]) -> int:
    """Return the number of updates after which the last iterate is reached."""
    return next(number for number, one in enumerate(iterates) if one == iterates[-1])


def _from_prompt(record: Record, span: range, seed: int) -> list[int]:
    """Return the first iterate: random tokens of the prompt; of the text before the block where there is no prompt."""
    random = Random(stream_seed(seed, "first iterate", record.id, span.start))
    prompt = record.tokens[: list(record.loss_mask).index(True)] or record.tokens[: span.start]
    return random.choices(prompt, k=len(span))


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the place of the first difference; their length where they are equal."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
