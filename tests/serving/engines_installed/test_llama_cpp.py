"""llama.cpp loads GGUF exports and decodes like the embedded evaluator. Needs its environment: make test-serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.core.texts import Prompt
from drafttrain.environments.environment import ask, check_installed, root
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.export.gguf_file import FILE, read_gguf, write_gguf
from drafttrain.serving.comparison import Comparison, compare_with_engine
from drafttrain.serving.engines import Job, ServingEngine, engine_of
from drafttrain.serving.engines.llama_cpp import TARGETS
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.export.test_gguf import BIASED, SIZES, WAYS, change, merging_tokenizer, rope, saved

pytestmark = pytest.mark.serving

TARGET, DRAFTER = "builtin:target", "builtin:drafter"
NUM_DRAFT_TOKENS = 4
NEW_TOKENS = 32
WHOLE = SIZES | {"vocab_size": len(merging_tokenizer())}
"""A size without padding rows: a random model would sample them, and llama.cpp treats them as tokens."""


@pytest.fixture(scope="module")
def engine() -> Iterator[ServingEngine]:
    """The engine; if it is not installed, the tests fail. The converted targets of these tests are deleted."""
    llama_cpp = engine_of("llama.cpp")
    check_installed(llama_cpp.environment)
    targets = root() / TARGETS
    before = set(targets.glob("*"))
    yield llama_cpp
    for made in set(targets.glob("*")) - before:
        made.unlink()


def compared(
    engine: ServingEngine, folder: Path, exported: Path, target: Target, prompts: list[Prompt], *, draft: str
) -> Comparison:
    """Serve an exported drafter and compare it with the folder that it was exported from."""
    drafter = read_drafter(folder, target)
    drafter.draft = draft
    tokens = [p.tokens for p in prompts]
    job = Job(resolve_folder(target.name), tokens, NEW_TOKENS, [0.0, 1.0], "float32", 128)
    return compare_with_engine(engine, exported, drafter, target, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The drafter of the package, whose weights are bfloat16: the engine is given them in float32, as vLLM takes them."""
    out = tmp_path_factory.mktemp("exported") / "drafter.gguf"
    target_config = read_target_config(resolve_folder(TARGET), name=TARGET)
    export_as("gguf", resolve_folder(DRAFTER), out, target_config=target_config)
    return out


@pytest.mark.parametrize("draft", ["greedy", "sampled"])
def test_a_trained_drafter_gives_the_same_tokens_and_the_same_counts(draft, engine, exported, target, prompts):
    found = compared(engine, resolve_folder(DRAFTER), exported, target, prompts, draft=draft)
    assert found.problems == ()
    assert found.draft == draft
    assert found.lossless.exact
    assert found.same_target.exact
    theirs, ours = found.greedy["engine"], found.greedy["evaluator"]
    assert theirs == ours
    assert 0 < theirs.accepted_at[1] < theirs.accepted_at[0] < theirs.num_drafts


def unpermuted(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    plain = load_file(resolve_folder(DRAFTER) / "model.safetensors")
    tensors["blk.0.attn_k.weight"] = plain["model.layers.0.self_attn.k_proj.weight"]


def turned(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    metadata["llama.rope.freq_base"] = 500.0


@pytest.mark.parametrize("fault", [unpermuted, turned])
def test_damage_that_llama_cpp_silently_loads_shows_in_its_counters(fault, engine, exported, target, prompts, tmp_path):
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    metadata, tensors = read_gguf(damaged / FILE)
    fault(tensors, metadata)
    write_gguf(damaged / FILE, metadata, tensors)
    found = compared(engine, resolve_folder(DRAFTER), damaged, target, prompts, draft="greedy")
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WHOLE, **BIASED)),
    "linear": lambda: LlamaForCausalLM(LlamaConfig(**WHOLE, **rope(rope_type="linear"))),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**WHOLE, **rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0))
    ),
    "yarn": lambda: Qwen3ForCausalLM(Qwen3Config(**WHOLE, head_dim=16, **rope(rope_type="yarn"))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WHOLE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WHOLE, head_dim=16, tie_word_embeddings=True)),
}


def noisy(model: Any) -> Any:
    """Return a drafter that is often right and often wrong: the target itself, a little of its weights noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_computes_and_ends_texts_as_here(kind, engine, tmp_path):
    """Random models, whose texts end at any place: two of their tokens are ends."""
    torch.manual_seed(0)
    folder = saved(MODELS[kind](), tmp_path / "target")
    target = Target.load(TargetSettings(model=str(folder)))
    source = tmp_path / "drafter"
    shutil.copytree(folder, source)
    noisy(Target.load(TargetSettings(model=str(folder))).model).save_pretrained(source)
    out = tmp_path / "drafter.gguf"
    export_as("gguf", source, out, target_config=read_target_config(folder, name=str(folder)))
    generator = torch.Generator().manual_seed(5)
    prompts = [Prompt(str(n), torch.randint(2, 262, (8,), generator=generator).tolist()) for n in range(12)]
    found = compared(engine, source, out, target, prompts, draft="greedy")
    assert found.problems == ()
    assert found.greedy["engine"] == found.greedy["evaluator"]
    assert 0 < found.greedy["engine"].num_accepted < found.greedy["engine"].num_draft_tokens


TEXTS = [
    "abc 12 ab 1234567,89  ab\n\n\tabc ab",
    "It's WE'LL they're\r\n  ünïcode — 漢字 😀 ab<|stop|>12 hello abhello",
    "  \n x  \n\n   y123 1 22 333 4444 ab'abc",
]


@pytest.mark.parametrize("way", WAYS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(way, engine, tmp_path):
    tokenizer = merging_tokenizer(way)
    folder = saved(MODELS["llama"](), tmp_path / "target", tokenizer)
    request = engine.request(Job(folder, [[2, 3]], 1, [0.0], "float32", 64), None)
    answer = ask(engine.environment, engine.worker, request | {"texts": TEXTS})
    assert answer["tokenized"] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_way_to_split_under_another_name_is_seen(engine, tmp_path):
    """The control of the test above: digits one by one are not digits by three."""
    tokenizer = merging_tokenizer("qwen2")
    folder = saved(MODELS["llama"](), tmp_path / "target", tokenizer)
    request = engine.request(Job(folder, [[2, 3]], 1, [0.0], "float32", 64), None)
    metadata, tensors = read_gguf(Path(request["target"]))
    wrong = tmp_path / "wrong.gguf"
    write_gguf(wrong, metadata | {"tokenizer.ggml.pre": "gpt-2"}, tensors)
    answer = ask(engine.environment, engine.worker, request | {"texts": TEXTS, "target": str(wrong)})
    assert answer["tokenized"] != [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_command_line_exports_proves_and_writes_both_columns_into_the_card(engine, tmp_path):
    source = Path(shutil.copytree(resolve_folder(DRAFTER), tmp_path / "drafter"))
    words = ["export", str(source), "export.verify_prompts=3", "export.verify_tokens=16", "--to", "gguf", "--verify"]
    done = CliRunner().invoke(app, [*words, "--target", TARGET])
    assert done.exit_code == 0, done.stderr
    assert "llama.cpp (gguf): passed" in done.stderr
    for folder in (source, tmp_path / "drafter.gguf"):
        (comparison,) = json.loads((folder / "engine.json").read_text())
        assert comparison["greedy"]["engine"] == comparison["greedy"]["evaluator"]
        card = (folder / "README.md").read_text()
        assert f"| temperature 0: drafts | {comparison['greedy']['engine']['num_drafts']} | " in card


def test_a_target_that_cannot_be_written_is_named(engine, tmp_path):
    drafter = saved(MODELS["llama"](), tmp_path / "drafter")
    folder = Path(shutil.copytree(drafter, tmp_path / "target"))
    change(folder, hidden_act="gelu")
    done = CliRunner().invoke(app, ["export", str(drafter), "--to", "gguf", "--target", str(folder), "--verify"])
    assert done.exit_code == 1
    assert f"{folder}: cannot be written as GGUF" in done.stderr
    assert "hidden_act is 'gelu'" in done.stderr
