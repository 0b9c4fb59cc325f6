"""Prompts and records with images: the states and logits of the multimodal model of transformers, through our cache and packing.

B = sequences, T = positions, V = vocabulary, D = hidden
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from torch import Tensor
from transformers.image_utils import load_image

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.images import Image, PlacedImages
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.image_reader import BadImage, picture_of
from tests.conftest import byte_tokenizer
from tests.multimodal import SHAPES, image, picture, write_target

NEEDS = TargetNeeds(hidden=(0, 2), final=True)


@pytest.fixture(scope="module", params=SHAPES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A random target of each shape in float64."""
    folder = write_target(tmp_path_factory.mktemp(request.param), request.param)
    return Target.load(TargetSettings(model=str(folder), images=True, dtype="float64"))


@pytest.fixture
def images() -> list[Image]:
    """Two images; the first is wide, which changes later positions where these depend on the grid."""
    return [image(1, width=56, height=28), image(2)]


def text_with(images: Sequence[Image], target: Target) -> list[int]:
    """Return a text with these images."""
    assert target.images is not None
    tokens = [65, 66]
    for number, one in enumerate(images):
        tokens += [*target.images.tokens_of(one), 70 + number, 71]
    return [*tokens, 80, 81, 82]


@torch.no_grad()
def whole_logits(target: Target, tokens: Sequence[int], images: Sequence[Image]) -> Tensor:
    """Return logits_TV of the multimodal model itself, with the inputs of its own processor."""
    assert target.vision is not None
    arguments = {"input_ids": torch.tensor([list(tokens)])}
    if images:
        arguments = target.vision.arguments([tokens], [images], device=target.device)
    logits_TV: Tensor = target.vision.whole(**arguments, use_cache=False).logits[0]
    return logits_TV


def test_the_cache_gives_the_logits_of_the_multimodal_model(target: Target, images: list[Image]) -> None:
    texts = [text_with(images, target), text_with(images[1:], target), [65, 66, 67, 68]]
    own = [images, images[1:], []]
    lm = target.decoder()
    lm.begin([text[:-2] for text in texts], images=own)
    # A tree of two children of the last token but one: also where positions are not the number of tokens before.
    seen = lm.forward([[text[-2], text[-1], 90] for text in texts], parents=[[-1, 0, 0]] * 3)
    for text, pictures, output in zip(texts, own, seen, strict=True):
        wanted_TV = whole_logits(target, text, pictures)
        beside_TV = whole_logits(target, [*text[:-1], 90], pictures)
        assert output.logits_BTV is not None
        torch.testing.assert_close(output.logits_BTV[0, :2], wanted_TV[-2:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output.logits_BTV[0, 2], beside_TV[-1], rtol=1e-9, atol=1e-9)


def test_positions_after_an_image_are_those_of_the_model(target: Target, images: list[Image]) -> None:
    """The control: with positions counted by tokens, Qwen2-VL gives other logits. The others count by tokens."""
    assert target.vision is not None
    text, lm = text_with(images, target), target.decoder()
    lm.begin([text[:-1]], images=[images])
    offsets = target.vision.offsets()
    lm.cache.continue_at([0])
    (seen,) = lm.forward([text[-1:]])
    assert seen.logits_BTV is not None
    equal = torch.allclose(seen.logits_BTV[0, -1], whole_logits(target, text, images)[-1], atol=1e-9)
    assert equal == (offsets is None)
    assert offsets is None or offsets[0] < 0


def test_packed_documents_with_images_are_read_as_alone(target: Target, images: list[Image]) -> None:
    one, two, plain = text_with(images, target), text_with(images[1:], target), [65, 66, 67]
    rows = [[*one, *plain], [*two, *[0] * (len(one) + len(plain) - len(two))]]
    positions = [[*range(len(one)), *range(len(plain))], [*range(len(two)), *range(len(rows[1]) - len(two))]]
    placed = [PlacedImages(1, 0, images[1:]), PlacedImages(0, 0, images)]
    seen = target.read(torch.tensor(rows), torch.tensor(positions), NEEDS | TargetNeeds(logits=True), images=placed)
    assert seen.logits_BTV is not None
    places = [(one, images, 0, 0), (plain, [], 0, len(one)), (two, images[1:], 1, 0)]
    for text, pictures, row, begin in places:
        found_TV = seen.logits_BTV[row, begin : begin + len(text)]
        torch.testing.assert_close(found_TV, whole_logits(target, text, pictures), rtol=1e-9, atol=1e-9)
    # What enters the first block at visual positions is what the projector gave.
    assert target.vision is not None
    assert target.images is not None
    made = target.images.arrays(images)
    features = target.vision.whole.get_image_features(
        **{
            name: value.to(torch.float64) if value.is_floating_point() else value
            for name, value in made.items()
            if name in ("pixel_values", "image_grid_thw")
        }
    ).pooler_output
    visual_T = torch.tensor(one) == target.images.visual_id
    assert torch.equal(
        seen.hidden_BTD[0][0, : len(one)][visual_T], torch.cat([part.flatten(0, -2) for part in features])
    )


def test_another_image_changes_all_later_rows_and_no_earlier_ones(target: Target, images: list[Image]) -> None:
    text = text_with(images, target)
    other = [images[0], image(5)]
    first, second = whole_logits(target, text, images), whole_logits(target, text, other)
    lm = target.decoder()
    states = []
    for pictures in (images, other):
        (seen,) = lm.begin([text], images=[pictures], needs=NEEDS)
        assert seen.final_BTD is not None
        states.append(seen.final_BTD[0])
    assert target.images is not None
    visual = [place for place, token in enumerate(text) if token == target.images.visual_id]
    begin = visual[len(visual) - target.images.tokens_of(images[1]).count(target.images.visual_id)]
    assert torch.equal(states[0][:begin], states[1][:begin])
    assert not (states[0][begin:] - states[1][begin:]).abs().amax(-1).lt(1e-6).any()
    assert not torch.allclose(first[-1], second[-1])


def test_text_alone_is_read_as_without_the_tower(target: Target) -> None:
    blind = Target.load(TargetSettings(model=target.name, dtype="float64"))
    tokens_BT = torch.tensor([[65, 66, 67, 68]])
    read = [one.read(tokens_BT, torch.arange(4)[None], TargetNeeds(logits=True)).logits_BTV for one in (target, blind)]
    assert read[0] is not None
    assert torch.equal(read[0], read[1])
    torch.testing.assert_close(read[0][0], whole_logits(target, [65, 66, 67, 68], []), rtol=1e-9, atol=1e-9)
    assert not any("vision" in name or "visual" in name for name, _ in blind.model.named_parameters())


@pytest.mark.parametrize("content", [b"", b"not an image", picture(1)[:60]])
def test_what_is_no_image_is_refused(target: Target, content: bytes) -> None:
    assert target.images is not None
    with pytest.raises(BadImage, match="not an image that can be decoded"):
        target.images.tokens_of(Image.of_bytes(content))


def test_an_image_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(picture(1))
    one = Image.of_file(path)
    assert one.read() == picture(1)
    path.write_bytes(picture(2))
    with pytest.raises(DataError, match="has changed since its record was encoded"):
        one.read()


def test_images_need_a_processor_and_a_multimodal_model(tmp_path: Path, tiny_target: Target) -> None:
    tiny_target.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"target\.images needs a processor that reads images .*, and none is here"
    ):
        Target.load(TargetSettings(model=str(tmp_path), images=True))


def encoded(drawn: Any, format: str = "PNG", **more: Any) -> Image:
    """Return a picture of Pillow as an encoded image."""
    written = io.BytesIO()
    drawn.save(written, format=format, **more)
    return Image.of_bytes(written.getvalue())


def test_pictures_are_decoded_as_transformers_loads_them(tmp_path: Path) -> None:
    """Upright by EXIF, first frames, three colours of any mode; the control is that EXIF turns the picture."""
    drawn = picture_of(image(3, width=40, height=20))
    turned = Picture.Exif()
    turned[0x0112] = 6
    cases = {
        "turned": encoded(drawn, "JPEG", exif=turned),
        "cmyk": encoded(drawn.convert("CMYK"), "JPEG"),
        "alpha": encoded(drawn.convert("RGBA")),
        "frames": encoded(drawn, "GIF", save_all=True, append_images=[drawn.rotate(180)]),
        "16 bits": encoded(Picture.new("I;16", (20, 20), 900)),
    }
    for name, one in cases.items():
        path = tmp_path / "picture"
        path.write_bytes(one.read())
        assert picture_of(one).tobytes() == load_image(str(path)).tobytes(), name
    assert picture_of(cases["turned"]).size == (20, 40)


def test_what_a_decoder_or_a_processor_refuses_is_a_bad_image(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert target.images is not None
    narrow = encoded(Picture.new("RGB", (3000, 3)))
    if target.name.endswith("qwen2_vl0"):
        with pytest.raises(BadImage, match=r"processor refuses it \(3000 x 3 pixels\): absolute aspect ratio"):
            target.images.tokens_of(narrow)
    else:
        target.images.tokens_of(narrow)
    with pytest.raises(BadImage, match="its format is unknown"):
        target.images.tokens_of(Image.of_bytes(b"<svg/>"))
    monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="decompression bomb"):
        target.images.tokens_of(narrow)
