"""The squares task: a picture shows what its description says, and builtin:viewer reads it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources.squares import COLOURS, JITTER, SIDE, Squares, SquaresSettings
from drafttrain.eval.prompts import prompt_file, read_prompts
from drafttrain.target_model import Target, TargetSettings


@pytest.fixture(scope="module")
def viewer() -> Target:
    return Target.load(TargetSettings(model="builtin:viewer", images=True))


def named(completion: str) -> list[str]:
    return [word for word in completion.split() if word in COLOURS]


def test_a_picture_shows_the_colours_that_its_description_names() -> None:
    for item in Squares(SquaresSettings(num_records=20)).items():
        content = base64.b64decode(item.value["images"][0]["bytes"])
        shown = Picture.open(io.BytesIO(content))
        assert shown.size == (2 * SIDE, 2 * SIDE)
        for number, name in enumerate(named(item.value["completion"])):
            pixel = shown.getpixel((SIDE * (number % 2) + 3, SIDE * (number // 2) + 3))
            assert all(abs(one - other) <= JITTER for one, other in zip(pixel, COLOURS[name], strict=True))


def test_held_out_colours_are_never_trained() -> None:
    sides = [
        {
            tuple(named(item.value["completion"]))
            for item in Squares(SquaresSettings(num_records=400, split=split)).items()
        }
        for split in ("train", "held_out")
    ]
    assert not sides[0] & sides[1]
    words = next(iter(Squares(SquaresSettings(images=False)).items())).value
    assert named(words["prompt"]) == named(words["completion"])
    assert "images" not in words


def test_the_builtin_viewer_names_the_colours_of_new_pictures(viewer: Target) -> None:
    encoder = Encoder(viewer.tokenizer, 128, images=viewer.images)
    items = list(Squares(SquaresSettings(num_records=12, seed=9, split="held_out")).items())
    records: list[Record] = [encoder.records(item.value, id=item.where)[0] for item in items]
    right = total = 0
    for record in records:
        start = list(record.loss_mask).index(True)
        answer = record.tokens[start:]
        rows = viewer.answer_rows(record.tokens[:start], answer, images=record.images)
        predicted = rows.at(torch.arange(len(answer)))[:, : viewer.num_tokens].argmax(-1).tolist()
        words = viewer.tokenizer.convert_ids_to_tokens(list(answer))
        found = [one == other for one, other, word in zip(predicted, answer, words, strict=True) if word in COLOURS]
        right, total = right + sum(found), total + len(found)
    assert total == 48
    assert right >= 44


def test_the_builtin_prompts_are_held_out_pictures(viewer: Target) -> None:
    for name in ("builtin:squares", "builtin:squares_validation"):
        assert Path(prompt_file(name)).exists()
        prompts = read_prompts(name, viewer.tokenizer, prompt_tokens=None, images=viewer.images)
        assert len(prompts) == 48
        assert all(len(prompt.images) == 1 for prompt in prompts)
