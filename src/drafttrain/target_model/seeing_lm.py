"""The cached language model of a multimodal target: it reads the images of prompts, and otherwise is a `CachedLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drafttrain.core.device_time import Span
from drafttrain.core.images import Image
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.part import by_sequence
from drafttrain.target_model.vision import Vision


class SeeingLM(CachedLM):
    """Prompts with images enter through the multimodal model's own forward, once; all later tokens are text.

    The work that is reported for such a prompt is that of the language model alone, the time is that of the whole.

    Args:
        vision: The multimodal model around `model`.
    """

    def __init__(self, model: Any, vision: Vision, *, name: str, listener: ForwardListener | None = None) -> None:
        super().__init__(model, name=name, listener=listener)
        self._vision = vision

    @torch.no_grad()
    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        needs: TargetNeeds | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[TargetOutput]:
        """Empty the cache and read these prompts in one call.

        Args:
            images: Of each prompt, in the order of their tokens; None: of none.
        """
        if images is None or not any(images):
            return super().begin(prompts, needs=needs, positions=positions)
        assert positions is None, "a part of a prompt with images is not read"
        needs, sizes, span = needs or TargetNeeds(), [len(prompt) for prompt in prompts], Span(self.device)
        self._empty(len(prompts), None)
        part, vision = self._blocks(range(self._num_layers)), self._vision
        arguments = vision.arguments(prompts, images, device=self.device)
        called = vision.whole if needs.logits else vision.trunk
        output, seen = self._call(called, arguments, sizes, [None] * len(prompts), needs, part, span, prefill=True)
        for cache in self._caches():
            cache.continue_at(vision.offsets())
            cache.commit()
        return by_sequence(output.logits if needs.logits else None, seen, sizes)
