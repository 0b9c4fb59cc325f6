"""Target, drafter, data and export that do not fit together: reported at once, before any weights are read."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DataError, RecipeError
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.pipeline.data import encoded_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.preflight import check_drafters, check_parts
from drafttrain.target_model import TargetSettings

RECIPE = """
name: tiny
target: {model: target}
drafter: {kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}
loss: {kind: ce}
data: {max_length: 40, sources: [{kind: jsonl, path: data.jsonl}]}
train: {max_steps: 12, warmup_steps: 2, loggers: [csv]}
eval: {prompts: data.jsonl, validation_prompts: data.jsonl}
"""
SaveLlama = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and all that it names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_llama(num_layers=2), tmp_path / "target")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def without_weights(folder: Path, **fields: Any) -> None:
    """Change fields of a configuration, and make weights that cannot be read: nothing may try."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    (folder / "model.safetensors").write_text("no weights")


def problems(*overrides: str, **wanted: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as refused:
        check_parts(load_recipe("r.yaml", overrides), **wanted)
    return refused.value.problems


def test_parts_that_fit_are_checked_without_reading_weights(place: Path) -> None:
    without_weights(place / "target")
    check_parts(load_recipe("r.yaml"))


def test_chats_to_evaluate_on_need_a_chat_template(place: Path) -> None:
    """They are found before texts are written and cached, not after."""
    without_weights(place / "target")
    chats = ["eval.prompts=builtin:chat", "eval.validation_prompts=builtin:chat_validation"]
    found = problems(*chats)
    assert [problem.partition(": /")[0] for problem in found] == [
        f"target.model: eval.{key}" for key in ("prompts", "validation_prompts")
    ]
    assert found[0].endswith(
        "chat.jsonl: 12 lines are not prompts, the first: line 1: a chat, but the tokenizer has no chat template: use prompt and "
        "completion, or text"
    )
    # The control: with a template they can be read.
    (place / "target" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    check_parts(load_recipe("r.yaml", chats))


def test_a_target_whose_state_cannot_be_rolled_back(place: Path) -> None:
    config = Lfm2Config(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, full_attn_idxs=[1])
    config.architectures = ["Lfm2ForCausalLM"]
    config.save_pretrained(place / "target")
    (problem,) = problems()
    assert problem.startswith("target.model: target: layers of kind conv have a state that cannot be rolled back")
    # The control: with attention alone it can be.
    without_weights(place / "target", layer_types=["full_attention"] * 2)
    check_parts(load_recipe("r.yaml"))


def test_fewer_rows_than_the_tokenizer_has_tokens(place: Path) -> None:
    without_weights(place / "target", vocab_size=250)
    (problem,) = problems()
    assert problem.startswith(
        "target.model: target has 250 embedding rows, but its tokenizer has ids up to 256: 7 tokens have no row"
    )


def test_more_rows_than_tokens_are_padding(place: Path) -> None:
    without_weights(place / "target", vocab_size=320)
    check_parts(load_recipe("r.yaml"))


def test_a_special_token_behind_the_rows_is_a_note(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(place / "target")
    without_weights(place / "target")
    check_parts(load_recipe("r.yaml"))
    assert "has 257 embedding rows and none for <pad>" in capsys.readouterr().err
    run = DrafterRun(load_recipe("r.yaml"), place / "runs" / "tiny")
    assert len(encoded_data(run).stores[0]) == 1
    (place / "data.jsonl").write_text('{"text": "good"}\n{"text": "a <pad> b"}\n')
    run = DrafterRun(load_recipe("r.yaml"), place / "runs" / "tiny")
    with pytest.raises(
        DataError, match=r"has 257 embedding rows, and none for: source jsonl: .* holds <pad> \(id 257\)"
    ):
        encoded_data(run)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["drafter={kind: eagle3, draft_vocab_size: 258}"],
            "drafter.draft_vocab_size must be 1..257 for target, got 258",
        ),
        (["drafter={kind: eagle3, taps: [0, 1, 2]}"], "drafter.taps must be 0..1 for target (2 layers), got [0, 1, 2]"),
        (
            ["drafter={kind: eagle3, draft_vocab_size: 200}", "eval.length={kind: rsd_c, branching: [201]}"],
            "eval.length: rsd_c has up to 201 children of a node, and the drafter drafts 200 tokens",
        ),
        (["drafter={kind: kangaroo, exit_layer: 2}"], "drafter.exit_layer must be 1..1 for target (2 layers), got 2"),
        (
            ["drafter={kind: causal_lm, init: target, num_layers: 3}"],
            "drafter.num_layers must be 1..2 for target, got 3",
        ),
        (["export.to=[gguf]"], "export.to: gguf: target: tokenizer.json: has no merges"),
        (["target.model=nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["data.sources.0.path=other.jsonl"], "data.sources.0: other.jsonl: no such file"),
        (["eval.prompts=other.jsonl"], "eval.prompts: other.jsonl: no such file"),
        (["target.tokenizer=./elsewhere"], "./elsewhere: no such folder"),
        (
            ["eval.beside=[{kind: rapid, retriever: {kind: embeddings, model: ./encoder}}]"],
            "eval.beside: retriever embeddings: model: ./encoder: no such folder",
        ),
        (
            ["eval.beside=[{kind: rasd, drafter: {kind: rapid, retriever: {kind: embeddings, model: .}}}]"],
            "eval.beside: retriever embeddings: model: .: no ",
        ),
    ],
)
def test_what_is_beyond_the_target(place: Path, overrides: list[str], words: str) -> None:
    without_weights(place / "target")
    (problem,) = problems(*overrides)
    assert words in problem


def test_a_library_that_only_the_evaluation_needs_is_missed_before_the_training(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = "eval.beside=[{kind: rapid}]"
    check_parts(load_recipe("r.yaml", [beside]))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert problems(beside) == (
        "eval.beside: retriever bm25 needs the library bm25s: pip install 'drafttrain[retrieval]', or use {kind: embeddings, model: FOLDER}",
    )


def test_a_start_with_too_few_rows_another_tokenizer_or_of_another_kind(place: Path, save_llama: SaveLlama) -> None:
    shutil.copytree(save_llama(num_layers=1), place / "start")
    without_weights(place / "target")
    start = "drafter={kind: causal_lm, init: checkpoint, checkpoint: start}"
    without_weights(place / "start", vocab_size=300)
    check_parts(load_recipe("r.yaml", [start]))
    without_weights(place / "start", vocab_size=200)
    assert "start has 200 embedding rows, but the target's tokenizer has 257 tokens" in problems(start)[0]
    tokenizer = json.loads((place / "start" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["!!"] = 257
    (place / "start" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer differs from the target's in 1 of 257 tokens" in problems(start)[0]
    of_another = "drafter={kind: eagle3, checkpoint: start}"
    assert "no drafttrain.json in it, so it is not a drafter folder" in problems(of_another)[0]
    # Evaluated with its own tokenizer, it needs a row for each of that one's tokens.
    with pytest.raises(RecipeError, match="start has 200 embedding rows, but its tokenizer has 258 tokens"):
        check_drafters(TargetSettings(model="target"), ["start"])


@pytest.mark.parametrize("kind", ["medusa", "eagle3"])
def test_a_start_whose_vocabulary_has_padding_of_the_target_is_refused(
    place: Path, save_llama: SaveLlama, kind: str
) -> None:
    """The target has 264 rows, its tokenizer 257 tokens."""
    shutil.rmtree(place / "target")
    shutil.copytree(save_llama(num_layers=3, vocab_size=264), place / "target")
    made = load_recipe("r.yaml", [f"drafter={{kind: {kind}, draft_vocab_size: 20}}"])
    DrafterRun(made, place / "run").write_start()
    start = f"drafter={{kind: {kind}, checkpoint: run/start}}"
    check_parts(load_recipe("r.yaml", [start]))
    path = place / "run" / "start" / "model.safetensors"
    tensors, (name,) = load_file(path), [name for name in ("token_map", "d2t") if name in load_file(path)]
    ids_R = tensors[name] + (torch.arange(20) if name == "d2t" else 0)
    ids_R[-2:] = torch.tensor([256, 260])
    tensors[name] = ids_R - (torch.arange(20) if name == "d2t" else 0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IndexError):
        DraftVocabulary(ids_R, num_tokens=257).places(size=257)
    (problem,) = problems(start)
    assert problem.startswith("drafter.checkpoint: run/start")
    assert f"{name} names 1 of 20 tokens that the target's tokenizer does not have, ids 260:" in problem
    assert "must be in 0..256" in problem


def test_all_problems_are_reported_at_once(place: Path) -> None:
    without_weights(place / "target", vocab_size=250)
    found = problems(
        "drafter={kind: causal_lm, init: target, num_layers: 9}", "export.to=[gguf]", "data.sources.0.path=other.jsonl"
    )
    assert len(found) == 5
    assert [problem.partition(":")[0] for problem in found] == [*["target.model"] * 4, "data.sources.0"]


def test_a_sliding_window_is_said_at_the_start(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_weights(place / "target", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)
    check_parts(load_recipe("r.yaml"))
    assert "a sliding window of 16 and data.max_length is 40" in capsys.readouterr().err
    without_weights(place / "target", model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False)
    check_parts(load_recipe("r.yaml"))
    assert "sliding window" not in capsys.readouterr().err


def test_what_is_not_here_yet_is_not_looked_at_by_the_check_of_a_recipe(place: Path) -> None:
    check_parts(load_recipe("r.yaml", ["target.model=owner/name"]), fetch=False)
    check_parts(load_recipe("r.yaml", ["target.model=recipe:demo"]), fetch=False)


@pytest.mark.parametrize("command", [["fit"], ["gen"], ["recipe", "check"]])
def test_every_command_looks_first(place: Path, command: list[str]) -> None:
    without_weights(place / "target", vocab_size=250)
    shown = CliRunner().invoke(app, [*command, "r.yaml"])
    assert shown.exit_code == 2
    assert "target has 250 embedding rows" in shown.output
    assert not (place / "runs" / "tiny" / "recipe.yaml").exists()


def odd_things(at: Path) -> dict[str, Path]:
    """Return what somebody may give in place of anything else."""
    (at / "empty").mkdir()
    (at / "binary").write_bytes(bytes(range(256)) * 8)
    (at / "words.txt").write_text("no JSON, no YAML: [\n")
    (at / "list.json").write_text("[1, 2]")
    return {"nothing": at / "nothing", **{name: at / name for name in ("empty", "binary", "words.txt", "list.json")}}


@pytest.mark.parametrize("thing", ["nothing", "empty", "binary", "words.txt", "list.json"])
@pytest.mark.parametrize(
    "words",
    [
        ["fit", "{}"],
        ["eval", "{}"],
        ["export", "{}"],
        ["export", "{}", "--to", "vllm"],
        ["import", "{}"],
        ["recipe", "check", "{}"],
        ["serve-config", "{}"],
        ["fit", "r.yaml", "target.model={}"],
        ["fit", "r.yaml", "target.tokenizer={}"],
        ["fit", "r.yaml", "drafter={{kind: causal_lm, init: checkpoint, checkpoint: '{}'}}"],
        ["fit", "r.yaml", "drafter={{kind: eagle3, checkpoint: '{}'}}"],
        ["fit", "r.yaml", "data.sources.0={{kind: parquet, path: '{}'}}"],
        ["fit", "r.yaml", "eval.prompts={}/file"],
        ["eval", "target", "--target", "{}"],
    ],
)
def test_no_path_that_is_given_ends_in_a_traceback(place: Path, words: list[str], thing: str) -> None:
    given = odd_things(place)[thing]
    shown = CliRunner().invoke(app, [word.format(given) for word in words])
    assert shown.exit_code in (1, 2), shown.output
    assert isinstance(shown.exception, SystemExit), shown.exception
    assert len(shown.output.splitlines()) < 20


def test_texts_beyond_the_positions_are_refused_where_those_are_learnt(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    check_parts(load_recipe("r.yaml", ["data.max_length=999999"]))
    assert "data.max_length: 999999 tokens are more than the" in capsys.readouterr().err
    shutil.copytree(place / "target", place / "learnt", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=257, **sizes)).save_pretrained(place / "learnt")
    without_weights(place / "learnt")
    assert problems("data.max_length=300", "eval.max_new_tokens=300", "target.model=learnt") == (
        "target.model: data.max_length: 300 tokens are more than the 64 positions of learnt",
        "target.model: eval.max_new_tokens: 301 tokens are more than the 64 positions of learnt",
    )
    check_parts(load_recipe("r.yaml", ["data.max_length=64", "eval.max_new_tokens=16", "target.model=learnt"]))


def test_layers_that_cannot_run_in_parallel_are_refused(place: Path) -> None:
    wanted = "eval.layer_parallel_size=4"
    (alone,) = problems(wanted)
    assert alone.endswith(
        "eval.layer_parallel_size: 4: the first and the last layer run alone, so a drafter needs at least 4 layers, got 1 "
        "(drafter.num_layers): set 1"
    )
    (kind,) = problems(wanted, "drafter={kind: eagle3}")
    assert "eval.layer_parallel_size: 4 needs a drafter.kind causal_lm, got eagle3" in kind
    check_parts(load_recipe("r.yaml", [wanted, "drafter.num_layers=4"]))
    started = (wanted, "drafter={kind: causal_lm, init: checkpoint, checkpoint: target}")
    (few,) = problems(*started)
    assert few.startswith("drafter.checkpoint: eval.layer_parallel_size: 4: the first and the last layer run alone")
    without_weights(place / "target", num_hidden_layers=6)
    check_parts(load_recipe("r.yaml", started))
    without_weights(place / "target", architectures=["MistralForCausalLM"])
    cut = (wanted, "drafter={kind: causal_lm, init: target, num_layers: 5}")
    for overrides in (started, cut):
        (other,) = problems(*overrides)
        assert "the drafter must be a LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, got Mistral" in other
