"""Reads images as the target does: the tokens that stand for one, and the arrays that its vision tower reads.

Both come from the processor of transformers in the target's folder.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image as Picture
from PIL.ImageOps import exif_transpose

from drafttrain.core.errors import CheckpointError
from drafttrain.core.images import Image
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.tokenizer import tokenizer_folder

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of a folder that determine how images become arrays."""
PARTS = ("image_processor", "image_token", "replace_image_token")
"""What a processor must have."""


class BadImage(ValueError):
    """An image cannot be decoded."""


class ImageReader:
    """The processor of a multimodal target."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer

    @classmethod
    def load(cls, settings: TargetSettings) -> ImageReader | None:
        """Return the reader of a target's images; None: `target.images` is false.

        Raises:
            CheckpointError: The folder has no processor that reads images.
        """
        if not settings.images:
            return None
        return cls.of_folder(tokenizer_folder(settings), trust_remote_code=settings.trust_remote_code)

    @classmethod
    def of_folder(cls, folder: Path, *, trust_remote_code: bool = False) -> ImageReader:
        """Return the reader of a folder with a processor.

        Raises:
            CheckpointError: It has none that reads images.
        """
        from transformers import AutoConfig
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        refusal = f"{folder}: target.images needs a processor that reads images ({' or '.join(PROCESSOR_FILES)})"
        if not processor_files(folder):
            raise CheckpointError(f"{refusal}, and none is here")
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            if type(config) not in PROCESSOR_MAPPING:
                raise ValueError(f"transformers has no processor of {config.model_type}")
            processor = for_images(PROCESSOR_MAPPING[type(config)]).from_pretrained(str(folder))
        except Exception as error:  # broken files and third-party code raise anything
            raise CheckpointError(f"{refusal}: {in_one_line(error)}") from error
        if missing := [name for name in PARTS if not hasattr(processor, name)]:
            raise CheckpointError(f"{refusal}: {type(processor).__name__} has no {', '.join(missing)}")
        return cls(processor)

    @property
    def placeholder(self) -> str:
        """The text that stands for one image in a prompt."""
        return str(self._processor.image_token)

    @cached_property
    def placeholder_id(self) -> int:
        """The token of `placeholder`."""
        return int(self._tokenizer.convert_tokens_to_ids(self.placeholder))

    @cached_property
    def visual_id(self) -> int:
        """The token at every position that the projector's embeddings take."""
        (token,) = self._processor.image_token_ids
        return int(token)

    def tokens_of(self, image: Image) -> list[int]:
        """Return the tokens that replace the placeholder of an image.

        Raises:
            BadImage: It cannot be decoded, or the processor refuses it.
        """
        picture = picture_of(image)
        try:
            arrays = self._arrays([picture])
        except (
            Exception
        ) as error:  # Qwen2-VL's refuses long and narrow images with a ValueError; others raise what they like
            size = f"{picture.width} x {picture.height} pixels"
            raise BadImage(f"the target's processor refuses it ({size}): {in_one_line(error)}") from error
        text = self._processor.replace_image_token(arrays, 0)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def arrays(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return the arrays of images in their order, as the target's forward takes them."""
        return dict(self._arrays([picture_of(image) for image in images]))

    def _arrays(self, pictures: Sequence[Any]) -> Any:
        return self._processor.image_processor(images=list(pictures), return_tensors="pt")


def for_images(processor: Any) -> Any:
    """Return a class of processors without its part for videos, which needs further libraries and is not used here."""

    class ForImages(processor):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor.get_attributes() if name != "video_processor"]

    ForImages.__name__ = processor.__name__
    return ForImages


def processor_files(folder: Path) -> list[Path]:
    """Return the files of a folder that determine how images become arrays."""
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]


def picture_of(image: Image) -> Any:
    """Return an image decoded as transformers' `load_image` does: upright by its EXIF orientation, in three colours.

    Raises:
        BadImage: It cannot be decoded.
    """
    content = image.read()
    try:
        with Picture.open(io.BytesIO(content)) as opened:
            return exif_transpose(opened).convert("RGB")
    except Picture.UnidentifiedImageError as error:
        raise BadImage("not an image that can be decoded: its format is unknown, or its beginning is broken") from error
    except Exception as error:  # broken files and decoders raise anything
        raise BadImage(f"not an image that can be decoded: {in_one_line(error)}") from error
