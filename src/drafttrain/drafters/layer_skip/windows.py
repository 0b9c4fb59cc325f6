"""Scores sets of skipped sublayers on windows of text: how often the draft's likeliest token is the text's.

N = tokens of a window, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drafttrain.core.random import stream
from drafttrain.core.texts import Record
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.sublayers import Skipped, Sublayers


@dataclass(frozen=True)
class Window:
    """A piece of a text, and all of the text before it."""

    context: list[int]
    tokens: list[int]
    labels: list[int | None]
    """The token after each one; None: it is not counted."""


def windows_of(records: Sequence[Record], *, size: int, seed: int) -> list[Window]:
    """Return a window of each text that has a label, of up to `size` tokens.

    It begins at a random token before a label: the root of a round is such a token.
    """
    found = []
    for record in records:
        roots = [place - 1 for place in range(1, len(record.tokens)) if record.loss_mask[place]]
        # Those with a whole window after them, if there are any.
        roots = [root for root in roots if root + size < len(record.tokens)] or roots
        if roots:
            begin = roots[int(torch.randint(len(roots), (), generator=stream(seed, "window", record.id)))]
            end = min(begin + size, len(record.tokens) - 1)
            counted = record.loss_mask[begin + 1 : end + 1]
            labels = [
                token if one else None for token, one in zip(record.tokens[begin + 1 : end + 1], counted, strict=True)
            ]
            found.append(Window(list(record.tokens[:begin]), list(record.tokens[begin:end]), labels))
    return found


def matched(lm: CachedLM, windows: Sequence[Window], sublayers: Sublayers, skipped: Skipped, *, num_tokens: int) -> int:
    """Return in how many labels of the windows the draft's likeliest token is the text's.

    One call reads all windows after the cached tokens of their texts, which are the target's own (SWIFT's parallel pass).

    Args:
        num_tokens: Ids that the tokenizer can produce.
    """
    cache = lm.cache.beside(skipped.attention, visible=[len(window.context) for window in windows])
    tokens = [window.tokens for window in windows]
    count = torch.zeros((), dtype=torch.long, device=lm.device)
    outputs = lm.read_beside(cache, tokens, sublayers=sublayers, skipped=skipped)
    for output, window in zip(outputs, windows, strict=True):
        assert output.logits_BTV is not None
        likeliest_N = output.logits_BTV[0, :, :num_tokens].max(dim=-1).indices
        labels_N = torch.tensor([-1 if label is None else label for label in window.labels]).to(lm.device)
        count += (likeliest_N == labels_N).sum()
    return int(count)


class WindowScores:
    """Scores sets on the same windows. The target reads the text before them once."""

    def __init__(self, target: Target, windows: Sequence[Window], sublayers: Sublayers) -> None:
        self._sublayers = sublayers
        self._num_tokens = target.num_tokens
        self._num_labels = sum(label is not None for window in windows for label in window.labels)
        self._read: list[tuple[CachedLM, Sequence[Window]]] = []
        """Windows that are read together, with the target's cache of the text before them."""
        longest = max(len(window.context) + len(window.tokens) for window in windows)
        alone = CachedLM(target.model, name="target").why_one_at_a_time(longest)
        for together in [[window] for window in windows] if alone else [windows]:
            lm = CachedLM(target.model, name="target")
            lm.begin([window.context for window in together])
            self._read.append((lm, together))

    def __call__(self, skipped: Skipped) -> float:
        """Return the share of the labels that the draft's likeliest token is."""
        found = sum(
            matched(lm, windows, self._sublayers, skipped, num_tokens=self._num_tokens) for lm, windows in self._read
        )
        return found / self._num_labels
