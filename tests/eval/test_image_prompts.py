"""Prompts with images are decoded losslessly, by every proposer and as transformers does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from drafttrain.core.generations import Generation
from drafttrain.core.roles import Proposer
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.generate import generate
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target, TargetSettings
from tests.multimodal import SHAPES, image, write_target

LENGTH = 12


@pytest.fixture(scope="module", params=SHAPES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A random target of each shape, in float64: near ties cannot explain anything."""
    folder = write_target(tmp_path_factory.mktemp(request.param), request.param)
    return Target.load(TargetSettings(model=str(folder), images=True, dtype="float64"))


def prompts_of(target: Target) -> list[Prompt]:
    """Return prompts of different lengths: with two images, with one of another size, and without."""
    assert target.images is not None
    one, two, wide = image(1), image(2), image(3, width=42, height=28)
    first = [65, 66, *target.images.tokens_of(one), 67, *target.images.tokens_of(two), 65, 66, 67, 65, 66]
    second = [*target.images.tokens_of(wide), 70, 71, 72, 70, 71]
    return [
        Prompt("two images", first, images=[one, two]),
        Prompt("one image", second, images=[wide]),
        Prompt("text", [80, 81, 82, 80, 81]),
    ]


def decoded(target: Target, proposer: Proposer, prompts: list[Prompt]) -> list[Generation]:
    engine = Engine(
        target,
        proposer,
        rule=Lossless(),
        policy=FixedLength(FixedLengthSettings(3)),
        sampling=Sampling(),
        max_new_tokens=LENGTH,
        stop_tokens=(),
    )
    return engine.generate(prompts)


def test_plain_decoding_of_image_prompts_writes_what_transformers_writes(target: Target) -> None:
    prompts = prompts_of(target)
    plain = decoded(target, NoDraft(), prompts)
    for prompt, one in zip(prompts, plain, strict=True):
        theirs = generate(prompt, target, max_new_tokens=LENGTH)
        assert list(one.tokens[: len(theirs.tokens)]) == list(theirs.tokens)
    # Together or alone: padding changes nothing.
    alone = [decoded(target, NoDraft(), [prompt])[0] for prompt in prompts]
    assert [one.tokens for one in alone] == [one.tokens for one in plain]


def test_drafted_decoding_of_image_prompts_writes_the_same_text(target: Target) -> None:
    prompts = prompts_of(target)
    plain = decoded(target, NoDraft(), prompts)
    drafted = decoded(target, Ngram(), prompts)
    assert any(one.rounds[0].num_draft_tokens for one in drafted), "nothing was drafted"
    found = parity(plain, drafted, target, images=[prompt.images for prompt in prompts])
    assert found.exact, found.text


def test_another_image_gives_another_text(target: Target) -> None:
    first, *_ = prompts_of(target)
    (one,) = decoded(target, NoDraft(), [first])
    others = [replace(first, images=[first.images[0], image(seed)]) for seed in range(9, 15)]
    another = next(
        found for other in others for found in decoded(target, NoDraft(), [other]) if found.tokens != one.tokens
    )
    # The control of parity: texts of different images are not equal, and rounding does not explain it.
    found = parity([one], [another], target, images=[first.images])
    assert found.num_unexplained == 1


def test_images_are_refused_where_the_target_reads_text_only(target: Target, tmp_path: Path) -> None:
    blind = Target(target.model, target.tokenizer, name="blind", fingerprint="")
    with pytest.raises(Exception, match=r"this model reads text only: see target\.images"):
        decoded(blind, NoDraft(), prompts_of(target)[:1])
