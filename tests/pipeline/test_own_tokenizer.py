"""A recipe whose drafter has its own tokenizer: trained, exported, evaluated, decoded by transformers; what cannot work is refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.commands.advise import Question, _opened
from drafttrain.commands.serve_config import serve_command
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.eval.result import read_result
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.preflight import check_drafters, check_parts
from drafttrain.target_model import Target, TargetSettings
from tests.conftest import random_llama
from tests.small_tokenizers import byte_level, letters, sentence_pieces

PIECES = sentence_pieces(["▁", *"abcdehinort", "▁t", "he", "▁the", "▁a", "nd", "▁and", "in"])
RECIPE = """
name: own
target: {model: target, dtype: float32}
drafter: {kind: causal_lm, tokenizer: bytes, num_layers: 1, hidden_size: 16, num_heads: 1}
loss: {kind: forward_kl}
data: {max_length: 64, sources: [{kind: jsonl, path: texts.jsonl}]}
train: {max_steps: 4, warmup_steps: 1, batch_size: 2, lr: 0.01, eval_every_steps: 4, eval_prompts: 1, loggers: [csv]}
eval: {prompts: texts.jsonl, validation_prompts: texts.jsonl, max_new_tokens: 12, temperatures: [0.0, 1.0]}
export: {require: {parity: true}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and all that it names: the target's tokenizer is in SentencePiece's form, the drafter's has bytes."""
    place = tmp_path_factory.mktemp("own_tokenizer")
    target = random_llama(vocab_size=len(PIECES.get_vocab()), num_layers=1)
    target.save_pretrained(place / "target")
    PIECES.save_pretrained(place / "target")
    byte_level(["t h", "th e", "a n", "an d"]).save_pretrained(place / "bytes")
    letters(["0"]).save_pretrained(place / "few")
    prompts = [
        {"prompt": "the cat and", "completion": " a hat in the tree"},
        {"prompt": "and a", "completion": " cat ran in"},
    ]
    (place / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    (place / "r.yaml").write_text(RECIPE)
    return place


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """The folder of an untrained drafter, evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = DrafterRun(load_recipe("r.yaml"), place / "run")
        run.write_start()
        found = evaluate_folders({"drafter": run.folder.start}, run.target, run.recipe.eval, dropped=())
        found.write(run.folder.eval)
    return run.folder.start


@pytest.mark.slow
def test_a_drafter_with_its_own_tokenizer_is_trained(place: Path) -> None:
    run = DrafterRun(load_recipe("r.yaml", ["train.max_steps=60", "train.log_every_steps=20"]), place / "trained")
    run.prepare()
    run.train()
    with (run.folder.train / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < 0.7 * losses[0]
    run.export_best()
    about = read_about(run.folder.drafter)
    assert about is not None
    assert about.own_tokenizer


def test_the_exported_folder_has_its_own_tokenizer_and_is_read_with_it(exported: Path) -> None:
    about = read_about(exported)
    assert about is not None
    assert about.own_tokenizer
    assert AutoTokenizer.from_pretrained(exported).get_vocab() == AutoTokenizer.from_pretrained("bytes").get_vocab()
    target = Target.load(TargetSettings(model="target"))
    drafter = read_drafter(exported, target)
    assert drafter.vocabulary is not None
    assert len(drafter.vocabulary) < target.num_tokens


def test_its_evaluation_is_lossless_and_states_the_bound_of_alpha(exported: Path) -> None:
    result = read_result(exported.parent / "eval.json")
    greedy, sampled = (part.drafters["drafter"] for part in result.temperatures)
    assert greedy.parity is not None
    assert greedy.parity.exact
    for figures in (greedy, sampled):
        assert figures.alpha is not None
        assert figures.alpha_bound is not None
        assert figures.alpha.value <= figures.alpha_bound
    assert sampled.alpha_bound is not None
    assert sampled.alpha_bound < 1
    # Greedy, the bound is the share of the output's tokens that both vocabularies have.
    assert greedy.alpha_bound == pytest.approx(greedy.draft_vocabulary_share)


def test_its_evaluation_by_strings_is_lossless_and_has_no_alpha(exported: Path) -> None:
    target = Target.load(TargetSettings(model="target"))
    settings = load_recipe("r.yaml", ["eval.across_tokenizers=strings"]).eval
    result = evaluate_folders({"drafter": exported}, target, settings, dropped=())
    greedy, sampled = (part.drafters["drafter"] for part in result.temperatures)
    assert greedy.parity is not None
    assert greedy.parity.exact
    assert result.settings["across_tokenizers"] == "strings"
    for figures in (greedy, sampled):
        assert (figures.alpha, figures.alpha_bound, figures.draft_vocabulary_share, figures.replay) == (
            None,
            None,
            None,
            {},
        )
        assert figures.vllm.num_draft_tokens > 0


@pytest.mark.parametrize("drafts", ["strings", "tokens"])
def test_advice_records_rounds_of_what_the_evaluation_drafted(exported: Path, tmp_path: Path, drafts: str) -> None:
    alone = shutil.copytree(exported, tmp_path / "alone")
    target, settings = Target.load(TargetSettings(model="target")), load_recipe("r.yaml").eval
    small = replace(settings, across_tokenizers=drafts, num_prompts=2, max_new_tokens=4, temperatures=[0.0])
    evaluate_folders({"drafter": alone}, target, small, dropped=()).write(alone / "eval.json")
    overrides = ["eval.prompts=texts.jsonl"]
    opened = _opened(Question(str(alone), "target", ["h100"], [1], [64], "bfloat16", overrides))
    assert opened.drafter.drafts_strings == (drafts == "strings")


def test_transformers_decodes_with_it_as_without(exported: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval() for folder in ("target", exported)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in ("target", exported)]
    target, assistant = models
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    given = tokenizers[0]("the cat and", return_tensors="pt")
    plain = target.generate(**given, **options)
    both = {"assistant_model": assistant, "tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1]}
    assert torch.equal(target.generate(**given, **both, **options), plain)


@pytest.mark.parametrize("name", ["vllm", "sglang", "speculators", "gguf", "openvino"])
def test_formats_of_engines_refuse_it(exported: Path, tmp_path: Path, name: str) -> None:
    config = read_target_config(Path("target"), name="target")
    with pytest.raises(CheckpointError, match=f"cannot be exported as {name}: its tokenizer is its own"):
        export_as(name, exported, tmp_path / "out", target_config=config)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "transformers"])
def test_engines_refuse_it(exported: Path, engine: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{engine} cannot run it: its tokenizer is its own.*assistant_tokenizer"
    ):
        serve_command(exported, engine, target="target")


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as found:
        check_parts(load_recipe("r.yaml", overrides))
    return "\n".join(found.value.problems)


def test_recipes_that_cannot_work_are_refused() -> None:
    assert "drafter.tokenizer: few: its tokenizer has" in refused("drafter.tokenizer=few", "target.model=target")
    assert "no tokenizer here" in refused("drafter.tokenizer=run")
    for key in ("init", "embedding_init"):
        assert f"drafter.{key}: 'target' starts from rows" in refused(f"drafter.{key}=target")
    for key in ("export.to=[vllm]", "export.verify=[transformers]"):
        assert "does not support a drafter with drafter.tokenizer" in refused(key)
    assert "cannot be chosen: use train.deepspeed.stage 0, 1 or 2" in refused("train.deepspeed={stage: 3}")
    assert "tokenizer: unknown key" in refused("drafter={kind: eagle, tokenizer: bytes}")
    assert "across_tokenizers: strings: the drafter has the target's tokenizer" in refused(
        "drafter.tokenizer=null", "eval.across_tokenizers=strings"
    )
    started = ("drafter.init=checkpoint", "drafter.checkpoint=target")
    assert "its tokenizer differs from the recipe's" in refused(*started)


def test_a_plain_model_with_another_tokenizer_is_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_llama(vocab_size=261, num_layers=1).save_pretrained(place / "plain")
    AutoTokenizer.from_pretrained("bytes").save_pretrained(place / "plain")
    check_drafters(TargetSettings(model="target"), ["plain"])
    assert "the vocabularies share" in capsys.readouterr().err
    same = place / "same"
    shutil.copytree(place / "target", same)
    settings = load_recipe("r.yaml", ["eval.across_tokenizers=strings"]).eval
    with pytest.raises(
        CheckpointError, match="across_tokenizers is strings, but no drafter here has its own tokenizer"
    ):
        evaluate_folders({"A": same}, Target.load(TargetSettings(model="target")), settings, dropped=())
    random_llama(vocab_size=100, num_layers=1).save_pretrained(place / "plain")
    with pytest.raises(RecipeError, match="plain has 100 embedding rows, but its tokenizer has 261 tokens"):
        check_drafters(TargetSettings(model="target"), ["plain"])
