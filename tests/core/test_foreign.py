"""Untrusted model folders: everything that could hang, fill the memory or link elsewhere is one message."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import MAX_DEPTH, check_folder, own_files, read_json
from drafttrain.core.tensors import check_finite, read_tensors
from drafttrain.export.folder import read_files
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.loading import load_causal_lm

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny target: a causal LM is a drafter too."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def deep(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return json.dumps(value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", f'{{"a": {DEEP}}}', "nested deeper than 64 levels"),
        ("config.json", deep(MAX_DEPTH + 1), "nested deeper than 64 levels"),
        ("generation_config.json", deep(900), "nested deeper than 64 levels"),
        ("tokenizer_config.json", "[1]", "must be a JSON object, is a list"),
        ("config.json", "{", "not readable as JSON"),
        ("config.json", b"\xff\xfe{}", "not readable as JSON"),
        ("config.json", '{"hidden_size": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("config.json", '{"model_type": ["llama"]}', "model_type must be a name, got ['llama']"),
        ("config.json", '{"dtype": {}}', "dtype must be a name, got {}"),
        ("config.json", '{"architectures": [1]}', "architectures must be a list of names, got [1]"),
        ("config.json", '{"architectures": "x"}', "architectures must be a list of names, got 'x'"),
        ("config.json", '{"medusa_num_heads": 1000000000}', "medusa_num_heads is 1000000000, at most 4096 is read"),
        ("config.json", '{"num_hidden_layers": "two"}', "num_hidden_layers must be a whole number, got 'two'"),
        ("config.json", '{"num_hidden_layers": true}', "num_hidden_layers must be a whole number, got True"),
        ("config.json", '{"text_config": {"vocab_size": 1e300}}', "text_config.vocab_size must be a whole number"),
        ("config.json", '{"rms_norm_eps": NaN}', "rms_norm_eps must be a finite number, got nan"),
        ("config.json", '{"rms_norm_eps": "small"}', "rms_norm_eps must be a number, got 'small'"),
        ("config.json", '{"rope_parameters": {"rope_theta": Infinity}}', "rope_parameters.rope_theta must be a finite"),
        ("config.json", '{"text_config": "x"}', "text_config must be a mapping, got 'x'"),
        ("config.json", '{"quantization_config": [1]}', "quantization_config must be a mapping, got [1]"),
        ("config.json", '{"num_attention_heads": 0}', "num_attention_heads must be 1 or more, got 0"),
        ("config.json", '{"hidden_size": -4}', "hidden_size must be 1 or more, got -4"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length must be a number, got 'x'"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * 300_000}), "chat_template: at most 262,144"),
        ("chat_template.jinja", "x" * 300_000, "300,000 bytes, of a chat template at most 262,144 are read"),
        ("config.json", '{"intermediate_size": [64, 1000000000]}', "intermediate_size is [64, 1000000000], at most"),
    ],
)  # fmt: skip
def test_unexpected_fields_are_named(folder, name, content, reason):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_nobody_reads_are_ignored(folder):
    """A trainer's logs, sizes by layer, unknown fields, large and deeply nested files with other names."""
    (folder / "trainer_state.json").write_text(DEEP)
    (folder / "notes.json").write_text("[1, 2]")
    os.mkfifo(folder / "pipe")
    # Mamba 2 has times without an end, others have no experts.
    changed(
        folder, intermediate_size=[64, 64], something={"new": [1]}, num_experts=0, time_step_limit=[0.0, float("inf")]
    )
    check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_instead_of_a_file_does_not_hang(folder, name, tiny_target):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (
        lambda: read_drafter(folder, tiny_target),
        lambda: Target.load(TargetSettings(model=str(folder))),
        lambda: import_folder(folder, folder.with_name("out"), target="builtin:target"),
    ):
        with pytest.raises(CheckpointError):
            read()


def test_several_faults_are_reported_together(folder):
    (folder / "tokenizer_config.json").write_text("[]")
    changed(folder, model_type=1, hidden_size=1 << 40)
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "1 of 8224 numbers are NaN or infinite"),
        (float("inf"), "1 of 8224 numbers are NaN or infinite"),
        (-float("inf"), "1 of 8224 numbers are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(folder, value, reason, dtype):
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    for read in (lambda: load_causal_lm(folder), lambda: read_files(folder), lambda: read_tensors(path)):
        with pytest.raises(CheckpointError, match=reason):
            read()


def test_large_finite_weights_are_accepted():
    """Their sum overflows, but each of them is finite."""
    check_finite({"a.weight": torch.full((64,), 3e38), "b": torch.zeros(0)}, where="x")


def test_integer_weights_are_refused_but_maps_of_ids_are_not(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(I64\)"):
        load_causal_lm(folder)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(I64\)"):
        read_files(folder)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors | {"d2t": torch.arange(3), "t2d": torch.ones(3, dtype=torch.bool)}, path)
    assert "d2t" in read_files(folder).tensors


def test_a_link_out_of_the_folder_is_not_copied(tmp_path, tiny_target, tiny_folder):
    """A link inside the folder, or into the blobs of the hub's cache, is copied."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    given = tmp_path / "given"
    given.mkdir()
    (given / "config.json").write_text("{}")
    (given / "generation_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"generation_config.json: a link to .*secret, outside the folder"):
        own_files(given)
    (given / "generation_config.json").unlink()
    (given / "generation_config.json").symlink_to(given / "config.json")
    assert len(own_files(given)) == 2
    cache = tmp_path / "models--x" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    (cache.parents[1] / "blobs").mkdir()
    (cache.parents[1] / "blobs" / "123").write_text("{}")
    (cache / "config.json").symlink_to("../../blobs/123")
    assert own_files(cache) == [cache / "config.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"kind": []}, r"kind must be a str, got \[\]"),
        ({"vocab_size": "many"}, "vocab_size must be a int, got 'many'"),
        ({"target": None}, "target must be a str, got None"),
    ],
)
def test_a_description_with_wrong_types_is_refused_naming_its_fields(tmp_path, content, reason):
    about = {
        "kind": "medusa",
        "target": "t",
        "target_fingerprint": "",
        "tokenizer_fingerprint": "",
        "vocab_size": 1,
        "trained_steps": 0,
    }
    (tmp_path / "drafttrain.json").write_text(json.dumps(about | content))
    with pytest.raises(CheckpointError, match=reason):
        read_about(tmp_path)
    (tmp_path / "drafttrain.json").write_text(json.dumps(about | {"a_later_field": 1}))
    assert read_about(tmp_path).kind == "medusa"


def test_json_is_an_object_of_bounded_size_and_depth(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(deep(MAX_DEPTH))
    assert read_json(path)
    for content in (deep(MAX_DEPTH + 1), DEEP, "null", "", "NaN", '"\\ud800'):
        path.write_text(content)
        with pytest.raises(CheckpointError):
            read_json(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "b.json")
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="104,857,600 bytes, at most"):
        read_json(path)


def test_only_links_of_files_that_are_read_matter_to_an_import(folder, tmp_path):
    (tmp_path / "notes").write_text("x")
    (folder / "README.md").symlink_to(tmp_path / "notes")
    os.mkfifo(folder / "log.pipe")
    own_files(folder, suffixes=(".json",))
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to(tmp_path / "notes")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: a link to"):
        own_files(folder, suffixes=(".json",))


def test_a_message_fits_on_one_screen(folder):
    changed(folder, **{f"{'x' * 3000}{number}_eps": "a" for number in range(500)})
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) < 900
    assert lines[-1].endswith("and 480 more")


@pytest.mark.parametrize(("shape", "reason"), [([64, 32], "lm_head|embed_tokens"), ([257, 16], "embed_tokens")])
def test_weights_with_other_shapes_are_named(folder, shape, reason):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.embed_tokens.weight": torch.zeros(shape)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"do not have the shapes that config.json implies: .*({reason}).*shape"):
        load_causal_lm(folder)


def test_ignored_weights_are_reported(folder, capsys):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.7.odd": torch.zeros(1)}, path, metadata={"format": "pt"})
    load_causal_lm(folder)
    assert "ignored weights that the model does not have: model.layers.7.odd" in " ".join(
        capsys.readouterr().err.split()
    )


def test_complex_weights_are_refused(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(32, dtype=torch.complex64)}, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(C64\)"):
        read_files(folder)
