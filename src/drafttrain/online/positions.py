"""Where the target refused the drafter's token, by replay of the rounds on the text; what a stack logged of them is in the records.

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
    rows = replay_rows(target, drafter, texts, sampling, num_depths=num_draft_tokens, any_text=True)
    found = []
    for text, row in zip(texts, rows, strict=True):
        # A text that the length ended has the target's own token last: the engine drafts none for that place.
        drafted_for = len(text.new) if text.new[-1] in target.eos_token_ids else len(text.new) - 1
        # An id that a log gave several requests names no draws by itself.
        named = (text.id, text.prompt, text.new)
        refused = _refusals(row, num_draft_tokens, drafted_for=drafted_for, seed=stream_seed(seed, *named))
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
