"""Sampled continuations of prompts, many at a time: a text is a pure function of its prompt, its random numbers and the weights.

B = sequences, T = new tokens, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.console import say_once
from drafttrain.core.images import Image
from drafttrain.core.probability import sampling_probs
from drafttrain.core.texts import Sampling
from drafttrain.target_model.cached_lm import CachedLM


@torch.no_grad()
def continued(
    prompts: Sequence[Sequence[int]],
    models: Sequence[CachedLM],
    *,
    num_tokens: int,
    ends: Collection[int],
    sampling: Sampling,
    limits: Sequence[int],
    numbers_BT: Tensor,
    model_BT: Tensor | None = None,
    written: Callable[[int], None] | None = None,
    images: Sequence[Sequence[Image]] | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, up to a token that ends a text or to its limit.

    Prompts of different lengths are read one at a time if a model cannot read them together.

    Args:
        models: They write the texts together: each of them reads every token.
        num_tokens: Ids below this can be drawn; those above are padding, or one of the models does not have them.
        limits: The most new tokens of each text.
        numbers_BT: Uniform numbers in [0, 1), float64. A token is drawn by inverting the cumulative distribution at its number.
        model_BT: Number of the model that draws each token; None: the first one draws all.
        written: Called after every step with the number of new tokens.
        images: Of each prompt, which all models read; None: of none.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) > 1:
        for lm in models:
            if why := lm.why_one_at_a_time(max(lengths) + max(limits)):
                say_once(f"{lm.name}: its texts are generated one at a time: {why}")
                same: Any = {"num_tokens": num_tokens, "ends": ends, "sampling": sampling, "written": written}
                return [
                    text
                    for row, prompt in enumerate(prompts)
                    for text in continued(
                        [prompt],
                        models,
                        limits=[limits[row]],
                        numbers_BT=numbers_BT[row : row + 1],
                        model_BT=None if model_BT is None else model_BT[row : row + 1],
                        images=None if images is None else images[row : row + 1],
                        **same,
                    )
                ]
    for lm in models:
        lm.begin([list(prompt[:-1]) for prompt in prompts], images=images)
    new: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    inputs = [prompt[-1] for prompt in prompts]
    for step in range(max(limits)):
        by_model = [choose(lm.step(inputs)[:, :num_tokens], sampling, numbers_BT[live, step]) for lm in models]
        chosen = by_model[0]
        if model_BT is not None:
            chosen = [by_model[model][place] for place, model in enumerate(model_BT[live, step].tolist())]
        for row, token in zip(live, chosen, strict=True):
            new[row].append(token)
        if written is not None:
            written(len(chosen))
        going = [place for place, row in enumerate(live) if new[row][-1] not in ends and len(new[row]) < limits[row]]
        if not going:
            break
        if len(going) < len(live):
            # Copying the cache of the others costs less than decoding rows that have ended.
            for lm in models:
                lm.drop(going)
            live = [live[place] for place in going]
        inputs = [new[row][-1] for row in live]
    return new


def choose(logits_BV: Tensor, sampling: Sampling, numbers_B: Tensor) -> list[int]:
    """Draw one token a row by inverting its cumulative distribution at the row's number."""
    if sampling.temperature == 0:
        # A CPU finds the largest of 16-bit numbers five times slower than of float32.
        greedy: list[int] = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).argmax(-1).tolist()
        return greedy
    below_BV = sampling_probs(logits_BV, sampling).cumsum(-1, dtype=torch.float64)
    drawn_B1 = torch.searchsorted(below_BV, numbers_B.to(below_BV.device)[:, None] * below_BV[:, -1:], right=True)
    drawn: list[int] = drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1).tolist()
    return drawn
