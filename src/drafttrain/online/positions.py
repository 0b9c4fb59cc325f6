"""Finds the positions at which the target refused a draft token, by replaying the rounds on the text.

If the serving stack logged its rounds, the records hold these positions already.

T = new tokens of a text, K = draft tokens
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Record, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.replay import ReplayRows, Text, replay_rows
from drafttrain.target_model import Target


def text_of(record: Record) -> Text:
    """Return a record as prompt and answer. The answer is the labelled end of a record."""
    start = len(record.tokens) - sum(record.loss_mask)
    return Text(record.id, list(record.tokens[:start]), list(record.tokens[start:]))


def refused_positions(
    target: Target, drafter: Drafter, records: Sequence[Record], sampling: Sampling, *, num_draft_tokens: int, seed: int
) -> list[list[int]]:
    """Return for each record the positions of the tokens with which the target replaced a refused draft token.

    With greedy drafts, the served text alone decides which draft tokens are accepted, so the replayed rounds equal the served ones.
    With sampled drafts, the rounds are sampled, with a random stream for each record.
    """
    texts = [text_of(record) for record in records]
    rows = replay_rows(target, drafter, texts, sampling, num_depths=num_draft_tokens, any_text=True)
    found = []
    for text, row in zip(texts, rows, strict=True):
        # If the length limit ended the text, the target itself wrote the last token: the engine drafts none for that position.
        drafted_for = len(text.new) if text.new[-1] in target.eos_token_ids else len(text.new) - 1
        # Several requests of a log may share an id, so the text is part of the name of the stream.
        named = (text.id, text.prompt, text.new)
        refused = _refusals(row, num_draft_tokens, drafted_for=drafted_for, seed=stream_seed(seed, *named))
        found.append([len(text.prompt) + place for place in refused])
    return found


def _refusals(rows: ReplayRows, num_draft_tokens: int, *, drafted_for: int, seed: int) -> list[int]:
    """Return the indices of the new tokens at which a round ended with a refusal.

    The token after a round with all draft tokens accepted corrects nothing, so it is not among them. Neither is a token that was not
    drafted.
    """
    draws = random.Random(seed)
    count = len(rows.acceptance_T)
    depth = min(num_draft_tokens, rows.deepest or num_draft_tokens)
    single = rows.accepted_TK.shape[1] == 1
    refused, start = [], 0
    while start < count:
        drafted = min(depth, drafted_for - start)
        place = start
        while place < start + drafted:
            if draws.random() >= rows.accepted_TK[place, 0 if single else place - start]:
                refused.append(place)
                break
            place += 1
        start = place + 1
    return refused
