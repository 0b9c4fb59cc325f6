"""The parts of a multimodal target that read images: tower and projector, around the language model that decodes.

They run once for a text, with its prompt: the model's own forward puts the projector's embeddings at the placeholders, and
decides positions (M-RoPE) and which image positions attend to each other. All later tokens are text.

B = sequences, N = tokens of one call (the longest sequence's)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.images import Image
from drafttrain.target_model.image_reader import ImageReader

KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Arguments of a model's forward that are 1 at visual positions (Gemma 3; Qwen2-VL)."""


class Vision:
    """A multimodal model and its processor. Its language model is the target's: the same modules.

    Args:
        whole: The model of transformers with tower, projector, language model and head.
    """

    def __init__(self, whole: Any, reader: ImageReader) -> None:
        self.whole = whole.eval().requires_grad_(False)
        self.reader = reader
        self._arguments = inspect.signature(whole.base_model.forward).parameters
        self._kinds = [name for name in KINDS_OF_TOKENS if name in self._arguments]

    @property
    def trunk(self) -> Any:
        """The model without its head."""
        return self.whole.base_model

    def arguments(
        self, texts: Sequence[Sequence[int]], images: Sequence[Sequence[Image]], *, device: torch.device
    ) -> dict[str, Any]:
        """Return the arguments of the model for whole texts; it computes positions itself.

        Args:
            images: Of each text, in the order of their tokens.

        Raises:
            CheckpointError: The model's forward does not take what its processor makes.
        """
        width = max(map(len, texts))
        tokens_BN = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]).to(device)
        made = self.reader.arrays([image for own in images for image in own])
        pixels = {name: value.to(device) for name, value in made.items() if name in self._arguments}
        if "pixel_values" not in pixels:
            raise CheckpointError(
                f"{type(self.whole).__name__}: its forward takes no pixel_values: use target.images: false"
            )
        found: dict[str, Any] = {"input_ids": tokens_BN, **pixels}
        found |= {name: (tokens_BN == self.reader.visual_id).long() for name in self._kinds}
        sizes = [len(text) for text in texts]
        if min(sizes) < width:
            sizes_B1 = torch.tensor(sizes, device=device)[:, None]
            found["attention_mask"] = (torch.arange(width, device=device) < sizes_B1).long()
        return found

    def offsets(self) -> list[int] | None:
        """Return by text of the last call how far its next position is from its number of tokens; None: 0 for all.

        With M-RoPE an image advances positions by the longer side of its grid, not by its number of tokens.
        """
        deltas_B1 = getattr(self.trunk, "rope_deltas", None)
        return None if deltas_B1 is None else [int(delta) for delta in deltas_B1.flatten().tolist()]

    def to(self, device: torch.device) -> Vision:
        """Move the tower and the projector to a device."""
        self.whole.to(device)
        return self
