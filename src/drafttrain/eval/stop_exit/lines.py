"""Completions of a line of code: where a line ends in tokens, which completions are equal, and cut texts to complete.

T = tokens of a text, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.errors import DataError
from drafttrain.core.random import stream
from drafttrain.target_model import Target
from drafttrain.target_model.token_bytes import token_bytes

LEAST_CONTEXT = 16
"""Tokens before a position that is labelled or completed."""


@dataclass(frozen=True)
class Case:
    """A cut text."""

    id: str
    context: Sequence[int]
    truth: Sequence[int]
    """The rest of the line, with the token that ends it."""


class Lines:
    """Which tokens end a line. What such a token spells behind the line end (the next line's indent) is no part of the completion.

    Raises:
        CheckpointError: It is not known what the tokenizer's tokens spell.
    """

    def __init__(self, target: Target) -> None:
        spelled = token_bytes(target.tokenizer, name=target.name)
        rows = max(target.vocab_size, *spelled) + 1 if spelled else target.vocab_size
        self.ends_V = torch.zeros(rows, dtype=torch.bool)
        self.same_V = torch.arange(rows)
        """By token, the first one that spells the same up to a line end."""
        first: dict[bytes, int] = {}
        for id, text in sorted(spelled.items()):
            if b"\n" in text:
                self.ends_V[id] = True
                self.same_V[id] = first.setdefault(text.partition(b"\n")[0], id)
        self.blank_V = torch.zeros(rows, dtype=torch.bool)
        for id, text in spelled.items():
            self.blank_V[id] = not text.partition(b"\n")[0].strip()

    def are_same(self, first: Sequence[int], second: Sequence[int]) -> bool:
        """Return whether two completions are equal up to the line end, token for token."""
        return self.same_V[list(first)].tolist() == self.same_V[list(second)].tolist()

    def next_end(self, tokens_T: Tensor) -> Tensor:
        """Return end_T: by position, the place of the first token behind it that ends a line; T if there is none."""
        length = len(tokens_T)
        places_T = torch.where(self.ends_V[tokens_T], torch.arange(length), length)
        after_T = torch.cat([places_T[1:], places_T.new_tensor([length])])
        return after_T.flip(0).cummin(0).values.flip(0)


def cases_of(
    texts: Sequence[tuple[str, Sequence[int]]],
    lines: Lines,
    *,
    number: int,
    context_tokens: int,
    max_tokens: int,
    seed: int,
) -> list[Case]:
    """Return texts that are cut at random places within a line, none of whose rests is blank.

    Args:
        texts: (id, tokens).
        max_tokens: Most tokens of the rest of a line.

    Raises:
        DataError: There are fewer such places than cases.
    """
    places: list[tuple[int, int, int]] = []
    for text, (_, tokens) in enumerate(texts):
        tokens_T = torch.tensor(list(tokens))
        end_T = lines.next_end(tokens_T)
        dense_T = (~lines.blank_V[tokens_T]).long().cumsum(0)
        for place in range(LEAST_CONTEXT, len(tokens)):
            end = int(end_T[place])
            if end < len(tokens) and end - place <= max_tokens and int(dense_T[end] - dense_T[place]) > 0:
                places.append((text, place + 1, end + 1))
    if len(places) < number:
        raise DataError(f"{len(places)} places to complete a line were found, {number} are asked for: give more texts")
    chosen = torch.randperm(len(places), generator=stream(seed, "cases"))[:number].sort().values.tolist()
    found = []
    for text, start, end in (places[index] for index in chosen):
        name, tokens = texts[text]
        found.append(Case(f"{name}:{start}", tokens[max(0, start - context_tokens) : start], tokens[start:end]))
    return found
