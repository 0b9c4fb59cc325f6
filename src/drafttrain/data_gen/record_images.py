"""The images of a record: from its key `images` to the tokens that stand for them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.images import Image
from drafttrain.core.printable import shortened
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.record_keys import IMAGES
from drafttrain.target_model.image_reader import BadImage, ImageReader

NO_READER = (
    "images: only text is read here. fit, gen and eval read images with target.images: true and a multimodal target"
)
DIGEST = "sha256"
"""Key beside the path of an image in texts that the target wrote: of another image they would be wrong."""
PARTS = ("image", "image_url", "input_image")
"""Types of a turn's part that is an image."""
CONTENTS = ("image", "image_url", "path", "url", "bytes", "base64")
"""Keys under which such a part may hold its image."""
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
    """Return turns with the target's placeholder where they name an image: as a part, or as data sets write it.

    Raises:
        BadItem: A part holds an image beside those of the record.
    """
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
        if held := [key for key in CONTENTS if turn.get(key)]:
            raise BadItem(
                f"{IMAGES}: a part of type {turn['type']} has an image of its own ({held[0]}): list it in {IMAGES}"
            )
        return placeholder
    return dict(turn) | {
        name: with_placeholders(turn[name], placeholder) for name in ("content", "value", "text") if turn.get(name)
    }


@dataclass(frozen=True)
class LocatedPath:
    """The path of an image as a record has it, and the folder that it is relative to.

    As text it is what the record has: the names of records do not depend on where a file lies.
    """

    written: str
    folder: Path

    def __str__(self) -> str:
        return self.written


def located(value: Any, folder: Path, *, under: str) -> Any:
    """Return a record in which paths of images are relative to a folder.

    Args:
        under: The key of the images; `data.images` is the key images inside the mapping data.
    """
    if not isinstance(value, dict):
        return value
    if given := value.get(under):
        own = [_located(one, folder) for one in given] if isinstance(given, list) else _located(given, folder)
        return value | {under: own}
    outer, _, inner = under.partition(".")
    if inner and isinstance(value.get(outer), dict):
        return value | {outer: located(value[outer], folder, under=inner)}
    return value


def stored(image: Image) -> dict[str, str]:
    """Return an image as a record in JSON holds it."""
    if image.path is not None:
        return {"path": image.path, DIGEST: image.digest}
    return {"bytes": base64.b64encode(image.read()).decode()}


def _located(one: Any, folder: Path) -> Any:
    if isinstance(one, str) and not one.startswith("data:"):
        return LocatedPath(one, folder)
    if isinstance(one, dict) and isinstance(one.get("path"), str) and not one.get("bytes"):
        return one | {"path": LocatedPath(one["path"], folder)}
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
    if not isinstance(path, str | LocatedPath) or not str(path):
        raise BadItem(f"{key}: must be a path, a data URL, or a mapping with path or bytes (base64)")
    folder = path.folder if isinstance(path, LocatedPath) else Path()
    try:
        # A path with a zero byte is a ValueError, an unknown user after ~ a RuntimeError.
        image = Image.of_file((folder / Path(str(path)).expanduser()).absolute())
    except (OSError, ValueError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BadItem(f"{key}: {shortened(str(path))}: cannot be read: {reason}{_relative_to(path)}") from error
    if isinstance(one, Mapping) and one.get(DIGEST, image.digest) != image.digest:
        raise BadItem(f"{key}: {shortened(str(path))}: differs from the image that the record was made of ({DIGEST})")
    return image


def _relative_to(path: str | LocatedPath) -> str:
    if isinstance(path, LocatedPath) and not Path(path.written).is_absolute():
        return f" (relative to {path.folder})"
    return ""


def _tokens_of(image: Image, key: str, reader: ImageReader) -> list[int]:
    try:
        return reader.tokens_of(image)
    except BadImage as error:
        raise BadItem(f"{key}: {error}") from error
