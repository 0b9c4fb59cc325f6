"""transformers' generate as a baseline: the target's greedy text, whatever its generation config contains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from drafttrain.core.device_time import Span
from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.target_model import Target


@torch.no_grad()
def generate(prompt: Prompt, target: Target, *, max_new_tokens: int) -> Generation:
    """Return the greedy text of transformers' generate, and its time."""
    tokens = torch.tensor([list(prompt.tokens)], device=target.device)
    vision = target.vision if prompt.images else None
    model, more = target.model if vision is None else vision.whole, dict[str, Any]()
    with plain_generation(target, model):
        span = Span(target.device)
        if vision is not None:
            more = vision.arguments([prompt.tokens], [prompt.images], device=target.device)
            del more["input_ids"]
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False, **more
        )
        span.end()
    return Generation(
        id=prompt.id,
        domain=prompt.domain,
        prompt_tokens=prompt.tokens,
        tokens=written[0, len(prompt.tokens) :].tolist(),
        rounds=[],
        prefill_seconds=0.0,
        draft_seconds=0.0,
        verify_seconds=0.0,
        seconds=span.seconds,
    )


@contextmanager
def plain_generation(target: Target, model: Any) -> Iterator[None]:
    """Replace the generation config of a model of the target by one that has only its end-of-text tokens.

    generate reads every argument that it is not given from that config: a repetition penalty, forced or suppressed tokens, a
    minimum length, beams. All of them change the text or the work.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=list(target.eos_token_ids) or None, pad_token_id=target.tokenizer.pad_token_id or 0
    )
    try:
        yield
    finally:
        model.generation_config = own
