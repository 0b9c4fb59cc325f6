"""Block efficiency for all draft lengths at once, from one parallel forward of each model over text of the target.

A committed token is an accepted draft with chance min(p, q)(y) / p(y); so the law of rounds follows from the rows alone. A token that
the target could not have written (in a log, whoever wrote that) is no draft that it accepts.

T = new tokens of a text, K = draft tokens, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drafttrain.core.probability import acceptance_rate, sampling_probs, without_padding
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record, Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.data_gen.groups import groups
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter
from drafttrain.losses.align import align
from drafttrain.target_model import Target

LOGITS_AT_ONCE = 1 << 27
"""Logits of one model that exist at once: 1,046 rows of 128,256 tokens, 0.5 GB in float32."""
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Text:
    """A prompt and what the target wrote after it, by the same sampling rule that is replayed."""

    id: str
    prompt: Sequence[int]
    new: Sequence[int]


@dataclass(frozen=True)
class ReplayRows:
    """What replay needs of one text."""

    id: str
    kept_TK: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    """[t, i]: chance that the (i + 1)-th draft token of a round that starts at new token t is the text's and is kept."""
    acceptance_T: np.ndarray[tuple[int], np.dtype[np.float64]]
    """Acceptance rate of the first draft token, sum_x min(p, q), by position."""
    deepest: int | None = None
    """Draft tokens of a round at most; None: the drafter goes on from its own tokens."""


@torch.no_grad()
def replay_rows(
    target: Target,
    drafter: Drafter,
    texts: Sequence[Text],
    sampling: Sampling,
    *,
    num_depths: int = 0,
    any_text: bool = False,
) -> list[ReplayRows]:
    """Return the rows of texts: a few forwards of each model, no decoding. What is read at once is bounded by tokens (`groups`).

    Args:
        num_depths: Draft tokens of the longest round that will be asked for; a drafter that feeds on its own states rolls
            out so many. 0: as many as it trains.
        any_text: The texts may be drawn by another rule than `sampling`: a draft token that is the text's is kept even where this
            rule never draws it.
    """
    found: dict[int, ReplayRows] = {}
    for group in groups([len(text.prompt) + len(text.new) for text in texts]):
        rows = _replay_batch(target, drafter, [texts[i] for i in group], sampling, num_depths, any_text=any_text)
        found |= dict(zip(group, rows, strict=True))
    return [found[number] for number in range(len(texts))]


def _replay_batch(
    target: Target, drafter: Drafter, texts: Sequence[Text], sampling: Sampling, num_depths: int, *, any_text: bool
) -> list[ReplayRows]:
    from dataclasses import replace

    records = [
        Record(text.id, [*text.prompt, *text.new], [False] * len(text.prompt) + [True] * len(text.new))
        for text in texts
    ]
    width = max(len(record.tokens) for record in records)
    batch, _ = pack(records, width=width, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    target_rows = target.rows_of(seen)
    # In training a drafter may be on another device than its target.
    device = next(drafter.parameters()).device
    batch = batch.to(device)
    drafted = drafter(replace(batch, target=seen.to(device), num_depths=num_depths))
    # An argmax draft is a law with one token: kept where it is the text's, accepted with the chance that the target gives it.
    draft_sampling = Sampling() if drafter.draft == "greedy" else sampling
    rows = align(drafted, batch)
    rows_at_once = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // target.vocab_size))
    by_depth: dict[int, list[np.ndarray]] = {}  # type: ignore[type-arg]
    first = 0
    for depth, count in rows.counts.items():
        kept, accepted = np.zeros(count), np.zeros(count)
        states_RD = drafted.states_BTD[depth].flatten(0, 1)
        for begin in range(first, first + count, rows_at_once):
            chosen = slice(begin, min(begin + rows_at_once, first + count))
            here = slice(chosen.start - first, chosen.stop - first)
            kept[here], accepted[here] = _chances(
                target_rows.at(rows.target_N[chosen]),
                drafted.head(states_RD[rows.drafter_N[chosen]], depth),
                rows.tokens_N[chosen],
                sampling,
                draft_sampling,
                num_tokens=target.num_tokens,
                vocabulary=drafted.vocabulary,
                any_text=any_text,
            )
        place_N = rows.index.sequence_N[first : first + count].cpu().numpy()
        for number in range(len(texts)):
            by_depth.setdefault(number, []).append(np.stack([kept[place_N == number], accepted[place_N == number]]))
        first += count
    deepest = len(rows.counts) if len(rows.counts) > 1 else drafter.deepest
    return [_rows_of(text, by_depth[number], deepest) for number, text in enumerate(texts)]


def _chances(
    target_logits_NV: torch.Tensor,
    drafter_logits_NV: torch.Tensor,
    tokens_N: torch.Tensor,
    sampling: Sampling,
    draft_sampling: Sampling,
    *,
    num_tokens: int,
    vocabulary: torch.Tensor | None,
    any_text: bool,
) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Return (chance that the text's token is an accepted draft token, acceptance rate) by row."""
    target_NV = sampling_probs(without_padding(target_logits_NV, num_tokens=num_tokens), sampling)
    drafted = DraftVocabulary(vocabulary, num_tokens=num_tokens)
    drafter_NV = drafted.probs(drafter_logits_NV, draft_sampling, size=target_NV.shape[-1])
    target_N = target_NV.gather(1, tokens_N[:, None])[:, 0].double()
    drafter_N = drafter_NV.gather(1, tokens_N[:, None])[:, 0].double()
    kept_N = (drafter_N / target_N.clamp_min(1e-300)).clamp(max=1.0)
    if not any_text:
        kept_N = torch.where(target_N > 0, kept_N, 0.0)
    return kept_N.cpu().numpy(), acceptance_rate(target_NV, drafter_NV).double().cpu().numpy()


def _rows_of(text: Text, depths: Sequence[np.ndarray], deepest: int | None) -> ReplayRows:  # type: ignore[type-arg]
    """Lay the rows out by round start: a drafter of depth 1 drafts its next token by itself, one place further on."""
    count = len(text.new)
    kept_TK = np.zeros((count, len(depths)))
    acceptance_T = np.zeros(count)
    for i, (kept, accepted) in enumerate(depths):
        # Depth i + 1 of a round that starts at t speaks of new token t + i. A drafter that looks at the token before the root
        # has no row at the start of a prompt of one token, and drafts nothing there.
        rows = kept[-(count - i) :] if i < count else kept[:0]
        kept_TK[count - i - len(rows) : count - i, i] = rows
        if i == 0:
            acceptance_T[count - len(accepted) :] = accepted
    return ReplayRows(text.id, kept_TK, acceptance_T, deepest)


def expected_rounds(rows: ReplayRows, num_draft_tokens: int) -> float:
    """Return how many rounds of this draft length the text is expected to have taken.

    start[t] is the chance that a round starts at new token t: a round that keeps exactly i draft tokens ends i + 1 further on.
    """
    count = len(rows.acceptance_T)
    num_draft_tokens = min(num_draft_tokens, rows.deepest or num_draft_tokens)
    start_T = np.zeros(count + num_draft_tokens + 2)
    start_T[0] = 1.0
    for t in range(count):
        alive = start_T[t]
        for i in range(num_draft_tokens):
            if t + i >= count:
                break
            kept = rows.kept_TK[t + i, 0] if rows.kept_TK.shape[1] == 1 else rows.kept_TK[t, i]
            start_T[t + i + 1] += alive * (1 - kept)
            alive *= kept
        start_T[t + num_draft_tokens + 1] += alive
    return float(start_T[:count].sum())
