"""The images of a record: from its key `images` to the tokens that stand for them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.images import Image
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.record_keys import IMAGES
from drafttrain.target_model.image_reader import BadImage, ImageReader

NO_READER = (
    "images: only text is read here. fit, gen and eval read images with target.images: true and a multimodal target"
)
IMAGE = "image"
"""Key of one image in some data sets, which `rename: {images: image}` reads."""
PARTS = ("image", "image_url", "input_image")
"""Types of a turn's part that is an image."""
WRITTEN = "<image>"
"""What data sets write in a turn where an image belongs, whatever the target's own placeholder is."""


def images_of(value: Mapping[str, Any]) -> list[Image]:
    """Return the images of a record.

    Raises:
        BadItem: One cannot be read, or has no known form.
    """
    given = value.get(IMAGES) or []
    given = given if isinstance(given, list) else [given]
    return [_image(one, f"{IMAGES}.{number}") for number, one in enumerate(given)]


def with_images(
    tokens: Sequence[int], mask_T: Sequence[bool], images: Sequence[Image], reader: ImageReader
) -> tuple[list[int], list[bool], list[Image]]:
    """Return tokens in which each placeholder is replaced by the tokens of its image, with their mask, and the images used.

    Tokens that hold those of the images already stay as they are.

    Args:
        images: In the order of their placeholders.

    Raises:
        BadItem: An image cannot be decoded or is part of an answer, or there are more or fewer placeholders.
    """
    places = [place for place, token in enumerate(tokens) if token == reader.placeholder_id]
    own = [_tokens_of(image, f"{IMAGES}.{number}", reader) for number, image in enumerate(images)]
    visual = sum(one.count(reader.visual_id) for one in own)
    if visual and tokens.count(reader.visual_id) == visual:
        return list(tokens), list(mask_T), list(images)
    if len(places) != len(images):
        raise BadItem(f"{IMAGES}: {len(images)} for {len(places)} placeholders ({reader.placeholder}) in the text")
    if any(mask_T[place] for place in places):
        raise BadItem(f"{IMAGES}: a placeholder ({reader.placeholder}) is in an answer: targets write text only")
    longer: list[int] = []
    masks: list[bool] = []
    begin = 0
    for place, one in zip(places, own, strict=True):
        longer += [*tokens[begin:place], *one]
        masks += [*mask_T[begin:place], *[False] * len(one)]
        begin = place + 1
    longer, masks = [*longer, *tokens[begin:]], [*masks, *mask_T[begin:]]
    if (count := longer.count(reader.visual_id)) != visual:
        raise BadItem(f"{IMAGES}: the text has {count} tokens of image positions, and its images take {visual}")
    return longer, masks, list(images)


def with_placeholders(turns: Any, placeholder: str) -> Any:
    """Return turns with the target's placeholder where they name an image: as a part, or as data sets write it."""
    if isinstance(turns, str):
        return turns.replace(WRITTEN, placeholder)
    if not isinstance(turns, list):
        return turns
    return [_placed(turn, placeholder) for turn in turns]


def _placed(turn: Any, placeholder: str) -> Any:
    if isinstance(turn, str):
        return turn.replace(WRITTEN, placeholder)
    if not isinstance(turn, Mapping):
        return turn
    if isinstance(turn.get("type"), str) and turn["type"] in PARTS:
        return placeholder
    return dict(turn) | {
        name: with_placeholders(turn[name], placeholder) for name in ("content", "value", "text") if turn.get(name)
    }


def located(value: Any, folder: Path) -> Any:
    """Return a record with the paths of its images relative to the folder of its file."""
    if not isinstance(value, dict):
        return value
    found = {key: value[key] for key in (IMAGES, IMAGE) if value.get(key)}
    return value | {
        key: [_located(one, folder) for one in given] if isinstance(given, list) else _located(given, folder)
        for key, given in found.items()
    }


def stored(image: Image) -> dict[str, str]:
    """Return an image as a record in JSON holds it."""
    if image.path is not None:
        return {"path": image.path}
    return {"bytes": base64.b64encode(image.read()).decode()}


def _located(one: Any, folder: Path) -> Any:
    if isinstance(one, str) and not one.startswith("data:"):
        return str((folder / Path(one).expanduser()).absolute())
    if isinstance(one, dict) and isinstance(one.get("path"), str) and not one.get("bytes"):
        return {"path": _located(one["path"], folder)}
    return one


def _image(one: Any, key: str) -> Image:
    if isinstance(one, Mapping):
        content, path = one.get("bytes"), one.get("path")
    else:
        content, path = (one.partition(",")[2], None) if str(one).startswith("data:") else (None, one)
    if isinstance(content, bytes):
        return Image.of_bytes(content)
    if isinstance(content, str) and content:
        try:
            return Image.of_bytes(base64.b64decode(content, validate=True))
        except (binascii.Error, ValueError) as error:
            raise BadItem(f"{key}: its bytes are not base64: {error}") from error
    if not isinstance(path, str) or not path:
        raise BadItem(f"{key}: must be a path, a data URL, or a mapping with path or bytes (base64)")
    try:
        return Image.of_file(Path(path))
    except OSError as error:
        raise BadItem(f"{key}: {path}: cannot be read: {error.strerror}") from error


def _tokens_of(image: Image, key: str, reader: ImageReader) -> list[int]:
    try:
        return reader.tokens_of(image)
    except BadImage as error:
        raise BadItem(f"{key}: {error}") from error
