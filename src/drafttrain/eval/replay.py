"""Block efficiency for all draft lengths at once, from one parallel forward of each model over text of the target.

Given that the target wrote token y, it was an accepted draft token with probability min(p, q)(y) / p(y). The distribution
of the rounds follows from these probabilities alone. A token of probability 0 under the target (in a log of another model)
is never an accepted draft token.

T = new tokens of a text, K = draft tokens, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from drafttrain.core.images import Image
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
"""Most logits of one model in memory: 1,046 rows of 128,256 tokens, 0.5 GB in float32."""
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Text:
    """A prompt and the text that the target wrote after it, with the sampling that is replayed."""

    id: str
    prompt: Sequence[int]
    new: Sequence[int]
    images: Sequence[Image] = ()
    """Of the prompt."""


@dataclass(frozen=True)
class ReplayRows:
    """Acceptance by position of one text."""

    id: str
    accepted_TK: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    """[t, i]: probability that the (i + 1)-th draft token of a round that starts at new token t is the text's and is
    accepted."""
    acceptance_T: np.ndarray[tuple[int], np.dtype[np.float64]]
    """Acceptance rate of the first draft token, sum_x min(p, q), by position."""
    deepest: int | None = None
    """Most draft tokens of a round; None: no limit, the drafter continues from its own tokens."""
    bound_T: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    """The target's probability of all tokens that can be drafted, by position: no acceptance rate is above it. None: it is 1."""


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
    """Return the rows of texts from a few forwards of each model, without decoding, batched by number of tokens.

    Args:
        num_depths: Draft tokens of the longest round that `expected_rounds` will be called with; a drafter that reads its
            own states is rolled out so far. 0: as far as in training.
        any_text: The texts may have been drawn with another sampling: a draft token that equals the text's can be accepted
            even where `sampling` never draws it.
    """
    found: dict[int, ReplayRows] = {}
    for group in groups([len(text.prompt) + len(text.new) for text in texts]):
        rows = _replay_batch(target, drafter, [texts[i] for i in group], sampling, num_depths, any_text=any_text)
        found |= dict(zip(group, rows, strict=True))
    return [found[number] for number in range(len(texts))]


def _replay_batch(
    target: Target, drafter: Drafter, texts: Sequence[Text], sampling: Sampling, num_depths: int, *, any_text: bool
) -> list[ReplayRows]:
    records = [
        Record(
            text.id,
            [*text.prompt, *text.new],
            [False] * len(text.prompt) + [True] * len(text.new),
            images=text.images,
        )
        for text in texts
    ]
    width = max(len(record.tokens) for record in records)
    batch, _ = pack(records, width=width, weight_of_step=1.0)
    needs = drafter.needs() | TargetNeeds(final=True)
    seen = target.read(batch.tokens_BT, batch.positions_BT, needs, images=batch.images)
    target_rows = target.rows_of(seen)
    # In training the drafter may be on another device than its target.
    device = drafter.device
    batch = batch.to(device)
    drafted = drafter(replace(batch, target=seen.to(device), num_depths=num_depths))
    # An argmax draft is a distribution with one token: its acceptance rate is the target's probability of that token.
    draft_sampling = Sampling() if drafter.draft == "greedy" else sampling
    rows = align(drafted, batch)
    rows_at_once = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // target.vocab_size))
    by_depth: dict[int, list[np.ndarray]] = {}  # type: ignore[type-arg]
    first = 0
    for depth, count in rows.counts.items():
        accepted, rate, bound = np.zeros(count), np.zeros(count), np.zeros(count)
        states_RD = drafted.states_BTD[depth].flatten(0, 1)
        for begin in range(first, first + count, rows_at_once):
            chosen = slice(begin, min(begin + rows_at_once, first + count))
            here = slice(chosen.start - first, chosen.stop - first)
            accepted[here], rate[here], bound[here] = _acceptance(
                target_rows.at(rows.target_N[chosen]),
                drafted.head(states_RD[rows.drafter_N[chosen]], depth),
                rows.tokens_N[chosen],
                sampling,
                draft_sampling,
                num_tokens=target.num_tokens,
                vocabulary=drafted.vocabulary,
                any_text=any_text,
            )
        if drafted.readable_BT is not None:
            # Of a drafter with its own tokenizer: decoding would draft there too, from a text that it reads differently.
            there = drafted.readable_BT.flatten()[rows.drafter_N[first : first + count]].cpu().numpy()
            accepted, rate = accepted * there, rate * there
        place_N = rows.index.sequence_N[first : first + count].cpu().numpy()
        for number in range(len(texts)):
            by_depth.setdefault(number, []).append(np.stack([accepted, rate, bound])[:, place_N == number])
        first += count
    deepest = len(rows.counts) if len(rows.counts) > 1 else drafter.deepest
    return [_rows_of(text, by_depth[number], deepest) for number, text in enumerate(texts)]


def _acceptance(
    target_logits_NV: torch.Tensor,
    drafter_logits_NV: torch.Tensor,
    tokens_N: torch.Tensor,
    sampling: Sampling,
    draft_sampling: Sampling,
    *,
    num_tokens: int,
    vocabulary: torch.Tensor | None,
    any_text: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Return (probability that the text's token is an accepted draft token, acceptance rate, its upper bound) by row."""
    target_NV = sampling_probs(without_padding(target_logits_NV, num_tokens=num_tokens), sampling)
    drafted = DraftVocabulary(vocabulary, num_tokens=num_tokens)
    drafter_NV = drafted.probs(drafter_logits_NV, draft_sampling, size=target_NV.shape[-1])
    target_N = target_NV.gather(1, tokens_N[:, None])[:, 0].double()
    drafter_N = drafter_NV.gather(1, tokens_N[:, None])[:, 0].double()
    accepted_N = (drafter_N / target_N.clamp_min(1e-300)).clamp(max=1.0)
    if not any_text:
        accepted_N = torch.where(target_N > 0, accepted_N, 0.0)
    bound_N = torch.ones_like(target_N) if vocabulary is None else target_NV[:, vocabulary].sum(dim=-1).double()
    rate_N = acceptance_rate(target_NV, drafter_NV).double()
    return accepted_N.cpu().numpy(), rate_N.cpu().numpy(), bound_N.cpu().numpy()


def _rows_of(text: Text, depths: Sequence[np.ndarray], deepest: int | None) -> ReplayRows:  # type: ignore[type-arg]
    """Arrange the rows by the start of the round."""
    count = len(text.new)
    accepted_TK = np.zeros((count, len(depths)))
    acceptance_T, bound_T = np.zeros(count), np.ones(count)
    for i, (accepted, rate, bound) in enumerate(depths):
        # Depth i + 1 of a round that starts at t is new token t + i. A drafter that reads the token before the root has no
        # row at the start of a prompt of one token, and drafts nothing there.
        rows = accepted[-(count - i) :] if i < count else accepted[:0]
        accepted_TK[count - i - len(rows) : count - i, i] = rows
        if i == 0:
            acceptance_T[count - len(rate) :] = rate
            bound_T[count - len(rate) :] = bound
    return ReplayRows(text.id, accepted_TK, acceptance_T, deepest, bound_T)


def mean_bound(rows: Sequence[ReplayRows]) -> float:
    """Return the target's probability of the tokens that can be drafted, over all positions: alpha is at most that."""
    bounds = [np.ones(len(one.acceptance_T)) if one.bound_T is None else one.bound_T for one in rows]
    return float(np.concatenate(bounds).mean())


def expected_rounds(rows: ReplayRows, num_draft_tokens: int) -> float:
    """Return the expected number of rounds of this draft length for the text.

    start[t] is the probability that a round starts at new token t. A round that accepts exactly i draft tokens ends i + 1
    tokens later.
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
            accepted = rows.accepted_TK[t + i, 0] if rows.accepted_TK.shape[1] == 1 else rows.accepted_TK[t, i]
            start_T[t + i + 1] += alive * (1 - accepted)
            alive *= accepted
        start_T[t + num_draft_tokens + 1] += alive
    return float(start_T[:count].sum())
