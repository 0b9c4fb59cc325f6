"""Where the target refused the drafter's token: as a serving stack logged its rounds, or by replay of the rounds on the text.

T = new tokens of a text, K = draft tokens
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from drafttrain.core.random import stream_seed
from drafttrain.core.records import Record, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.replay import ReplayRows, Text, replay_rows
from drafttrain.target import Target


def text_of(record: Record) -> Text:
    """Return a record as a prompt and what the target wrote after it; an answer is the end of its record."""
    start = len(record.tokens) - sum(record.loss_mask)
    return Text(record.id, list(record.tokens[:start]), list(record.tokens[start:]))


def refused_positions(
    target: Target, drafter: Drafter, records: Sequence[Record], sampling: Sampling, *, num_draft_tokens: int, seed: int
) -> list[list[int]]:
    """Return for each record the positions of the tokens that the target put in place of a refused draft token.

    Greedy drafts: the served text decides their fate whatever it was drawn with, so these are the rounds as they were served.
    Sampled ones: a round is drawn, by streams named by the record.
    """
    texts = [text_of(record) for record in records]
    rows = replay_rows(target, drafter, texts, sampling, num_depths=num_draft_tokens)
    found = []
    for text, row in zip(texts, rows, strict=True):
        # A text that the length ended has the target's own token last: the engine drafts none for that place.
        drafted_for = len(text.new) if text.new[-1] in target.eos_token_ids else len(text.new) - 1
        refused = _refusals(row, num_draft_tokens, drafted_for=drafted_for, seed=stream_seed(seed, text.id))
        found.append([len(text.prompt) + place for place in refused])
    return found


def _refusals(rows: ReplayRows, num_draft_tokens: int, *, drafted_for: int, seed: int) -> list[int]:
    """Return the new tokens at which a round ended with a refusal.

    The token after a round of which all was kept corrects nothing and is none of them; so is one that no draft token was for.
    """
    draws = random.Random(seed)
    count = len(rows.acceptance_T)
    depth = min(num_draft_tokens, rows.deepest or num_draft_tokens)
    single = rows.kept_TK.shape[1] == 1
    refused, start = [], 0
    while start < count:
        drafted = min(depth, drafted_for - start)
        place = start
        while place < start + drafted:
            if draws.random() >= rows.kept_TK[place, 0 if single else place - start]:
                refused.append(place)
                break
            place += 1
        start = place + 1
    return refused


def logged_refusals(drafted: Sequence[int], accepted: Sequence[int], *, num_tokens: int) -> list[int]:
    """Return the answered tokens at which a round ended with a refusal, from what a stack logged of its rounds.

    A last round that kept fewer than it drafted because an end of text was among the kept ones refused nothing: then the rounds
    have one token more than the answer.

    Args:
        drafted: Draft tokens of each round.
        accepted: Of these, how many were kept.
        num_tokens: Tokens of the answer.

    Raises:
        ValueError: These are not the rounds of such an answer.
    """
    if len(drafted) != len(accepted) or any(
        not 0 <= kept <= count for kept, count in zip(accepted, drafted, strict=True)
    ):
        raise ValueError("a round keeps 0 to all of its draft tokens")
    emitted = sum(accepted) + len(accepted)
    if emitted - num_tokens not in (0, 1):
        raise ValueError(f"rounds of {emitted} tokens, an answer of {num_tokens}")
    refused, place = [], 0
    for count, kept in zip(drafted, accepted, strict=True):
        if kept < count and place + kept < num_tokens:
            refused.append(place + kept)
        place += kept + 1
    return refused
