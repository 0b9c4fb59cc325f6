"""Records and prompts with images: their tokens, what is quarantined, stores, shards, caches and the curriculum."""

from __future__ import annotations

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.backends.builtin import BuiltinSettings
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.curriculum import CurriculumSampler, CurriculumSettings, share_with_images
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.names import content_name
from drafttrain.data_gen.record_images import stored
from drafttrain.data_gen.settings import DataSettings, GenerateSettings
from drafttrain.data_gen.sources import Item
from drafttrain.data_gen.sources.generated import GeneratedSettings
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings
from drafttrain.data_gen.sources.parquet import Parquet, ParquetSettings
from drafttrain.data_gen.stored.records import records_of
from drafttrain.data_gen.training_data import TrainingData, attach_cache, note_contamination, prepare
from drafttrain.eval.prompts import read_prompts
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.image_reader import picture_of
from tests.multimodal import SHAPES, picture, write_target

ASKED = "What is <image> this?"


@pytest.fixture(scope="module", params=SHAPES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = write_target(tmp_path_factory.mktemp(request.param), request.param)
    return Target.load(TargetSettings(model=str(folder), images=True))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two pictures, one that is cut off, and one that is none."""
    (tmp_path / "one.png").write_bytes(picture(1))
    (tmp_path / "two.png").write_bytes(picture(2))
    (tmp_path / "cut.png").write_bytes(picture(3)[:80])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(*images: Any, text: str = ASKED, answer: str = "a cat") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
        "images": list(images),
    }


def data_of(path: Path, target: Target, folder: Path, **settings: Any) -> TrainingData:
    source = JSONLSettings(path=str(path), max_lost_share=1.0)
    source.kind = "jsonl"  # type: ignore[attr-defined]
    made = DataSettings(sources=[source], max_length=128, **settings)
    return prepare(made, folder, tokenizer=target.tokenizer, tokenizer_fingerprint="", images=target.images, seed=0)


def test_tokens_are_those_of_the_processor(target: Target, files: Path) -> None:
    assert target.images is not None
    encoder = Encoder(target.tokenizer, 256, images=target.images)
    item = asked(str(files / "one.png"), {"bytes": base64.b64encode(picture(2)).decode()}, text="<image>and <image>\nx")
    (record,) = encoder.records(item, id="a")
    parts = [{"type": "image"}, {"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "x"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    text = target.tokenizer.apply_chat_template(chat, tokenize=False)
    processor = target.images._processor
    theirs = processor(text=[text], images=[[picture_of(one) for one in record.images]], add_special_tokens=False)
    assert list(record.tokens) == list(theirs["input_ids"][0])
    labels = [token for token, label in zip(record.tokens, record.loss_mask, strict=True) if label]
    assert target.tokenizer.decode(labels) == "a cat<|end|>"
    assert target.images.visual_id not in labels


def test_bad_images_are_quarantined_with_their_place(target: Target, files: Path, tmp_path: Path) -> None:
    path = write_lines(
        files / "records.jsonl",
        asked("one.png"),
        asked("missing.png"),
        asked("cut.png"),
        asked("text.png"),
        asked("one.png", "two.png"),
        asked(text="What <image>?"),
        asked({"bytes": "?"}),
        asked(7),
        {"text": "plain <image>", "images": ["one.png"]},
        {"prompt": "a", "completion": "b", "images": 7.5},
        asked("zero\0byte.png"),
        asked("~nobody-here/a.png"),
    )
    data = data_of(path, target, tmp_path / "data")
    assert len(data.stores[0]) == 1
    lines = (tmp_path / "data" / "0-jsonl" / "quarantine.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["where"] for one in found] == [f"{path}:{number}" for number in range(2, 13)]
    wanted = [
        "images.0: .*missing.png: cannot be read: No such file",
        "images.0: not an image that can be decoded",
        "images.0: not an image that can be decoded",
        "images: 2 for 1 placeholders",
        "images: (0 for 1 placeholders|the text has 1 tokens of image positions)",
        "images.0: its bytes are not base64",
        "images.0: must be a path, a data URL",
        "images: plain text is cut into windows",
        "images.0: must be a path, a data URL",
        r"images.0: zero\\x00byte.png: cannot be read: embedded null byte",
        "images.0: ~nobody-here/a.png: cannot be read: ",
    ]
    for one, reason in zip(found, wanted, strict=True):
        assert re.match(reason, one["reason"]), (reason, one["reason"])


def test_paths_are_relative_to_the_file_under_any_key(
    target: Target, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    one = asked("one.png")
    renamed = {key: part for key, part in one.items() if key != "images"}
    path = write_lines(files / "records.jsonl", renamed | {"photo": "one.png"})
    nested = write_lines(files / "nested.jsonl", renamed | {"data": {"photos": [{"path": "one.png"}]}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([one]), files / "records.parquet")
    cases: list[Any] = [
        JSONL(JSONLSettings(path=str(path), rename={"images": "photo"})),
        JSONL(JSONLSettings(path=str(nested), rename={"images": "data.photos"})),
        Parquet(ParquetSettings(path=str(files / "records.parquet"))),
    ]
    for source in cases:
        encoder = Encoder(target.tokenizer, 128, images=target.images)
        encoder = encoder.reading_as(JSONLSettings(path="", rename={"images": source.images}))
        (item,) = source.items()
        (record,) = records_of(item, source, encoder)
        assert [image.path for image in record.images] == [str(files / "one.png")]


def test_names_of_records_do_not_depend_on_where_their_file_lies(target: Target, files: Path) -> None:
    """A name selects the record's random numbers; the control is another image."""
    names = []
    for place, picture_file in (("a", "one.png"), ("b", "one.png"), ("c", "two.png")):
        (files / place).mkdir()
        (files / place / picture_file).write_bytes((files / picture_file).read_bytes())
        (item,) = JSONL(JSONLSettings(path=str(write_lines(files / place / "r.jsonl", asked(picture_file))))).items()
        encoder = Encoder(target.tokenizer, 128, images=target.images)
        names += [record.id for record in encoder.records(item.value, id=content_name(item.value))]
    assert names[0] == names[1] == content_name(asked("one.png"))
    assert names[0] != names[2]


def test_answers_to_an_image_that_has_changed_are_quarantined(target: Target, files: Path) -> None:
    encoder = Encoder(target.tokenizer, 128, images=target.images)
    (image,) = encoder.images_of(asked(str(files / "one.png")))
    shard = asked(stored(image))
    assert encoder.records(shard, id="a")
    (files / "one.png").write_bytes(picture(2))
    with pytest.raises(BadItem, match="differs from the image that the record was made of"):
        encoder.records(shard, id="a")


def test_image_tokens_without_an_image_are_quarantined(target: Target) -> None:
    """Beside a record with images they would end the training; plain text and sources of whole records too."""
    assert target.images is not None
    token = target.tokenizer.convert_ids_to_tokens(target.images.visual_id)
    encoder = Encoder(target.tokenizer, 128, images=target.images)
    for value in ({"text": f"plain {token} text"}, {"prompt": "a", "completion": token}):
        with pytest.raises(BadItem, match="images: "):
            records_of(Item("", value), JSONL(JSONLSettings(path="")), encoder)
    assert records_of(Item("", {"text": "plain text"}), JSONL(JSONLSettings(path="")), encoder)


def test_an_image_inside_a_part_is_not_ignored(target: Target, files: Path) -> None:
    encoder = Encoder(target.tokenizer, 128, images=target.images)
    part = {"type": "image"}
    item = asked(str(files / "one.png"), text=[part, {"type": "text", "text": "What?"}])  # type: ignore[arg-type]
    assert encoder.records(item, id="a")
    part["image"] = "two.png"
    with pytest.raises(BadItem, match=r"has an image of its own \(image\): list it in images"):
        encoder.records(item, id="a")


def test_a_template_that_reads_text_gets_text(target: Target, files: Path) -> None:
    """It would write a list of parts as Python does; the control is that another template's text holds no such thing."""
    assert target.images is not None
    tokenizer = copy.deepcopy(target.tokenizer)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    tokenizer.chat_template = plain + "{% if add_generation_prompt %}assistant: {% endif %}"
    for one in (tokenizer, target.tokenizer):
        item = asked(str(files / "one.png"))
        (record,) = Encoder(one, 128, images=target.images).records(item, id="a")
        assert "type" not in one.decode(record.tokens)
        assert target.images.visual_id in record.tokens


def test_records_with_images_are_refused_where_only_text_is_read(target: Target, files: Path) -> None:
    path = write_lines(files / "prompts.jsonl", {"question": ASKED, "images": ["one.png"]})
    with pytest.raises(DataError, match=r"line 1: images: only text is read here.*target\.images: true"):
        read_prompts(str(path), target.tokenizer, prompt_tokens=None)
    (prompt,) = read_prompts(str(path), target.tokenizer, prompt_tokens=None, images=target.images)
    assert [Path(str(image.path)).name for image in prompt.images] == ["one.png"]


def test_the_target_answers_prompts_with_images_and_its_answers_are_records(target: Target, files: Path) -> None:
    path = write_lines(
        files / "prompts.jsonl",
        {"question": ASKED, "images": ["one.png"]},
        {"question": ASKED, "images": [{"bytes": base64.b64encode(picture(2)).decode()}]},
        {"question": "Only text?"},
    )
    source = JSONLSettings(path=str(path))
    source.kind = "jsonl"  # type: ignore[attr-defined]
    backend = BuiltinSettings()
    backend.kind = "builtin"  # type: ignore[attr-defined]
    settings = GenerateSettings(prompts=source, num_records=3, max_new_tokens=5, temperatures=[0.0], backend=backend)
    folder = generate(settings, target, files / "data" / "generated", seed=0, max_length=128)
    generated = GeneratedSettings(path=str(folder))
    generated.kind = "generated"  # type: ignore[attr-defined]
    made = DataSettings(sources=[generated], max_length=128)
    data = prepare(
        made, files / "stores", tokenizer=target.tokenizer, tokenizer_fingerprint="", images=target.images, seed=0
    )
    records = [data.stores[0][number] for number in range(3)]
    assert sorted(len(record.images) for record in records) == [0, 1, 1]
    for record in records:
        start = list(record.loss_mask).index(True)
        rows = target.answer_rows(record.tokens[:start], record.tokens[start:], images=record.images)
        logits_NV = rows.at(torch.arange(len(record.tokens) - start))[:, : target.num_tokens]
        assert logits_NV.argmax(-1).tolist() == list(record.tokens[start:])


def test_a_cache_holds_the_states_of_image_records(target: Target, files: Path) -> None:
    """Records with the same tokens and different images share no rows; the control is that their states differ."""
    path = write_lines(files / "records.jsonl", asked("one.png"), asked("two.png"), asked(text="no image"))
    needs = TargetNeeds(hidden=(0,), final=True)
    data = data_of(path, target, files / "data", cache="states")
    attach_cache(data, files / "data", target, num_records=3, needs=needs)
    batches = [data.of_step(step, batch_size=1)[0] for step in range(3)]
    finals = {}
    for batch in batches:
        assert batch.target is not None
        assert batch.target.final_BTD is not None
        live = target.read(batch.tokens_BT, batch.positions_BT, needs, images=batch.images)
        assert live.final_BTD is not None
        torch.testing.assert_close(batch.target.final_BTD, live.final_BTD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.target.hidden_BTD[0], live.hidden_BTD[0], rtol=1e-4, atol=1e-4)
        finals[batch.images[0].images[0].path if batch.images else None] = batch.target.final_BTD
    one, two = (finals[str(files / f"{name}.png")] for name in ("one", "two"))
    assert one.shape == two.shape
    assert not torch.allclose(one[:, -4:], two[:, -4:], atol=1e-3)


def test_an_image_of_the_training_data_contaminates_a_prompt_and_a_question_does_not(
    target: Target, files: Path
) -> None:
    long = "What can be seen in this picture of many things, please? <image>"
    records = write_lines(files / "records.jsonl", asked("one.png", text=long))
    prompts = write_lines(
        files / "prompts.jsonl",
        {"id": "same", "question": long, "images": ["one.png"]},
        {"id": "other", "question": long, "images": ["two.png"]},
    )
    data = data_of(records, target, files / "data")
    found = {
        ("p", one.id): one
        for one in read_prompts(str(prompts), target.tokenizer, prompt_tokens=None, images=target.images)
    }
    dropped = note_contamination(
        data,
        {key: [one.tokens] for key, one in found.items()},
        files / "contamination.json",
        images={key: one.images for key, one in found.items()},
    )
    assert dropped == [("p", "same")]


def test_the_curriculum_reads_text_first_and_ends_with_images() -> None:
    values = [share_with_images(place, text_share=0.5) for place in (0, 0.25, 0.5, 0.75, 1, 2)]
    assert values == [0, 0, 0, 0.5, 1, 1]
    sampler = CurriculumSampler(
        [5, 7, 3],
        [1.0, 1.0, 2.0],
        seed=0,
        with_images=[False, True, False],
        settings=CurriculumSettings(),
        num_records=400,
    )
    sources = [sampler.at(position)[0] for position in range(500)]
    assert 1 not in sources[:200]
    assert sources[200:300].count(1) == pytest.approx(25, abs=1)
    assert sources[300:400].count(1) == pytest.approx(75, abs=1)
    assert set(sources[400:]) == {1}
    # Text keeps its weights, and every source its own order of records.
    assert sources[:200].count(2) == pytest.approx(2 * sources[:200].count(0), abs=2)
    seen = [sampler.at(position)[1] for position in range(500) if sources[position] == 1]
    assert all(set(seen[begin : begin + 7]) == set(range(7)) for begin in range(0, len(seen) - 6, 7)), "epoch by epoch"


def test_a_curriculum_needs_both_kinds_of_sources() -> None:
    with pytest.raises(DataError, match="no source has images"):
        CurriculumSampler([5], [1.0], seed=0, with_images=[False], settings=CurriculumSettings(), num_records=10)
