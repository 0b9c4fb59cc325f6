"""End tokens of a target whose files name different ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.end_tokens import end_ids

SaveLlama = Callable[..., Path]


def named(folder: Path, file: str, **fields: Any) -> Path:
    """Change fields of a JSON file in a folder; None removes a field."""
    path = folder / file
    held = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("generation", "configuration", "ends"),
    [
        (None, None, {0}),
        (5, None, {0, 5}),
        (None, 6, {0, 6}),
        ([5, 7], 6, {0, 5, 6, 7}),
        ([0], [0], {0}),
        # LlamaConfig's default end token is 2. It counts only if the file names it.
        (5, 2, {0, 2, 5}),
    ],
)
def test_a_text_ends_at_the_end_tokens_of_all_places(
    save_llama: SaveLlama, generation: Any, configuration: Any, ends: set[int]
) -> None:
    folder = save_llama(num_layers=1)
    named(folder, "config.json", eos_token_id=configuration)
    named(folder, "generation_config.json", eos_token_id=generation)
    assert set(Target.load(TargetSettings(model=str(folder))).eos_token_ids) == ends


def test_without_a_generation_config_the_configuration_names_the_ends(save_llama: SaveLlama) -> None:
    folder = named(save_llama(num_layers=1), "config.json", eos_token_id=9)
    (folder / "generation_config.json").unlink()
    assert set(Target.load(TargetSettings(model=str(folder))).eos_token_ids) == {0, 9}


def test_a_tokenizer_without_an_end_token_removes_none(save_llama: SaveLlama) -> None:
    folder = named(save_llama(num_layers=1), "tokenizer_config.json", eos_token=None)
    target = Target.load(TargetSettings(model=str(folder)))
    assert target.tokenizer.eos_token_id is None
    assert end_ids(target.model, target.tokenizer) == (0,)


def test_different_ends_are_reported_in_one_line(save_llama: SaveLlama, capsys: pytest.CaptureFixture[str]) -> None:
    folder = named(save_llama(num_layers=1), "generation_config.json", eos_token_id=5)
    _ = Target.load(TargetSettings(model=str(folder))).eos_token_ids
    lines = [line for line in capsys.readouterr().err.splitlines() if "ends texts at" in line]
    assert len(lines) == 1
    assert "generation config ends texts at 5" in lines[0]
    assert "<|end|>" in lines[0]


def test_equal_ends_are_not_reported(save_llama: SaveLlama, capsys: pytest.CaptureFixture[str]) -> None:
    _ = Target.load(TargetSettings(model=str(save_llama(num_layers=1)))).eos_token_ids
    assert "ends texts" not in capsys.readouterr().err


def test_the_target_stops_writing_at_the_end_that_only_the_tokenizer_names(save_llama: SaveLlama) -> None:
    folder = named(save_llama(num_layers=1), "generation_config.json", eos_token_id=5)
    named(folder, "config.json", eos_token_id=5)
    target = Target.load(TargetSettings(model=str(folder)))
    with torch.no_grad():
        # Every next token is the tokenizer's end.
        target.model.get_output_embeddings().weight.zero_()
    (new,) = continuations([Task("a", [10, 11], Sampling())], target, max_new_tokens=6, seed=0)
    assert new == [0]


def test_a_target_whose_files_name_different_end_tokens(shared_folder: Path) -> None:
    """Labels of generated texts end at `<|im_end|>`, which the generation config does not name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = shared_folder / "cases" / "reports" / "28-eos" / "model-eosgap"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(list(end_ids(model, tokenizer))) == ["<|endoftext|>", "<|im_end|>"]
