"""OpenVINO GenAI loads exports and decodes like the embedded evaluator. Needs its environment: make test-serving."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt
from drafttrain.environments.environment import EngineError, ask, check_installed
from drafttrain.eval.prompts import read_prompts
from drafttrain.export.convert import check_exported, export_as, read_target_config
from drafttrain.serving.comparison import Comparison, compare_with_engine, plain_output
from drafttrain.serving.engines import Job, ServingEngine, Use, engine_of
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.export import folders
from tests.export.trained import learn
from tests.serving.engines_installed.conftest import NEW_TOKENS, SETTINGS, STEPS

pytestmark = pytest.mark.serving

TARGET = "builtin:target"
NUM_DRAFT_TOKENS = 3
PLACES = (0, 1, 3, 5, 7, 9)
"""Tapped blocks of the embedded target, grown to ten layers."""

DEEP = """
name: deep
target: {{model: null, tokenizer: "builtin:target"}}
drafter: {{kind: causal_lm, init: checkpoint, checkpoint: "{start}"}}
loss: {{kind: ce}}
data: {{max_length: 128, overlap_ngram: 0, sources: [{{kind: stdlib, split: held_out}}]}}
train: {{max_steps: 30, batch_size: 8, lr: 6e-3, warmup_steps: 0, eval_every_steps: 0}}
"""
"""Train all parameters of a target on plain text."""

UNTIMED = {"seconds": 0.0, "prompt_seconds": 0.0, "cpu_seconds": 0.0}
GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"


@pytest.fixture(scope="module")
def engine() -> ServingEngine:
    """The engine; if it is not installed, the tests fail."""
    openvino = engine_of("openvino")
    check_installed(openvino.environment)
    return openvino


@pytest.fixture(scope="module")
def target_config() -> dict[str, Any]:
    return read_target_config(resolve_folder(TARGET), name=TARGET)


@pytest.fixture(scope="module")
def prompts(target) -> list[Prompt]:
    return read_prompts("builtin:test", target.tokenizer, prompt_tokens=24, limit=8)


@pytest.fixture(scope="module")
def exported(learned, target_config, tmp_path_factory):
    """A function that returns the OpenVINO folder of a kind; made once a kind."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("exported") / "out"
            export_as("openvino", learned(kind), made[kind], target_config=target_config)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def served(engine, target, prompts, job, plain, learned):
    """A function that serves an exported folder and compares it with the folder of its kind that has learned."""

    def compared(kind: str, folder: Path) -> Comparison:
        drafter = read_drafter(learned(kind), target)
        return compare_with_engine(
            engine, folder, drafter, target, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS, plain=plain
        )

    return compared


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3"])
def test_each_kind_gives_the_same_tokens_and_the_same_counts(kind, served, exported):
    found = served(kind, exported(kind))
    assert found.problems == ()
    assert found.lossless.exact
    assert found.same_target.exact
    theirs, ours = found.greedy["engine"], found.greedy["evaluator"]
    assert theirs == ours
    assert 0 < theirs.accepted_at[1] < theirs.accepted_at[0] < theirs.num_drafts
    assert found.json()["sampled"] is None


def test_a_drafted_end_token_ends_no_round(engine, job, plain, exported, tmp_path):
    """OpenVINO ends texts, and drafts, at the tokens that the drafter's own generation_config.json names."""
    ending = Path(shutil.copytree(exported("causal_lm"), tmp_path / "drafter"))
    written = Counter(token for one in plain for token in one.tokens)
    ends = {"eos_token_id": [token for token, _ in written.most_common(20)]}
    (ending / "generation_config.json").write_text(json.dumps(ends))
    found = []
    for folder in (exported("causal_lm"), ending):
        request = engine.request(job, Use(str(folder), "causal_lm", NUM_DRAFT_TOKENS, "greedy"))
        (decoded,) = engine.decoded(ask(engine.environment, engine.worker, request))
        found.append([replace(one, **UNTIMED) for one in decoded])
    assert found[0] == found[1]


def change_graph(folder: Path, taps: str) -> None:
    path = folder / GRAPH
    changed, times = re.subn(
        r'<hidden_layers_list value="[^"]*"', f'<hidden_layers_list value="{taps}"', path.read_text()
    )
    assert times == 1
    path.write_text(changed)


def forget_taps(folder: Path) -> None:
    path = folder / GRAPH
    path.write_text(re.sub(r"<hidden_layers_list [^>]*/>", "", path.read_text()))


def constant(folder: Path, name: str) -> tuple[int, int]:
    """Return where a constant of a graph begins and how long it is."""
    layer = re.search(
        rf'name="{re.escape(name)}" type="Const".*?offset="(\d+)" size="(\d+)"', (folder / GRAPH).read_text(), re.S
    )
    assert layer
    return int(layer[1]), int(layer[2])


def change_constant(folder: Path, name: str, kind: type, change) -> None:
    start, size = constant(folder, name)
    whole = bytearray((folder / WEIGHTS).read_bytes())
    values = np.frombuffer(bytes(whole[start : start + size]), dtype=kind)
    whole[start : start + size] = change(values).astype(kind).tobytes()
    (folder / WEIGHTS).write_bytes(bytes(whole))


def shift_taps(folder: Path) -> None:
    change_graph(folder, "1 3 4")


def swap_columns(folder: Path) -> None:
    change_constant(
        folder, "self.model.fc.weight", np.float32, lambda v: v.reshape(-1, 3, 192)[:, [1, 0, 2]].reshape(-1)
    )


def shift_map(folder: Path) -> None:
    change_constant(folder, "self.model.d2t", np.int64, lambda v: v + 1)


def turn_slower(folder: Path) -> None:
    change_constant(
        folder, "__module.model.rotary_emb/aten::to/Convert", np.float32, lambda v: v / np.arange(1, len(v) + 1)
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shift_taps, r"hidden_layers_list is \[1, 3, 4\], must be \["),
        (swap_columns, r"fc\.weight: \d+ of \d+ values differ"),
        (shift_map, "d2t: 3072 of 3072 values differ"),
        (turn_slower, r"rotary_emb\.inv_freq: 15 of 16 values differ"),
    ],
)
def test_a_damaged_graph_is_named_and_changes_the_counts(
    damage, named, served, exported, learned, target_config, tmp_path
):
    folder = Path(shutil.copytree(exported("eagle3"), tmp_path / "out"))
    check_exported("openvino", learned("eagle3"), folder, target_config=target_config)
    damage(folder)
    with pytest.raises(CheckpointError, match=named):
        check_exported("openvino", learned("eagle3"), folder, target_config=target_config)
    found = served("eagle3", folder)
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]


def test_a_truncated_file_is_named(exported, learned, target_config, tmp_path):
    folder = Path(shutil.copytree(exported("causal_lm"), tmp_path / "out"))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"openvino_model\.bin: the weights cannot be read: model\.layers\.0"):
        check_exported("openvino", learned("causal_lm"), folder, target_config=target_config)


def test_without_the_taps_openvino_refuses_a_target_of_few_layers(engine, exported, job, tmp_path):
    """Why the taps are written into the graph: else it picks blocks itself, and only of ten or more."""
    folder = Path(shutil.copytree(exported("eagle3"), tmp_path / "out"))
    forget_taps(folder)
    request = engine.request(job, Use(str(folder), "eagle3", NUM_DRAFT_TOKENS, "greedy"))
    with pytest.raises(EngineError, match="num_decoder_layers >= 10"):
        ask(engine.environment, engine.worker, request)


@pytest.fixture(scope="module")
def grown(target, tmp_path_factory) -> Path:
    """The embedded target with blocks between its own that change nothing: ten layers."""
    config = copy.deepcopy(target.model.config)
    config.num_hidden_layers = 10
    torch.manual_seed(0)
    model = type(target.model)(config).eval()
    state = model.state_dict()
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name].zero_()
    for name, tensor in target.model.state_dict().items():
        state[re.sub(r"layers\.(\d+)", lambda found: f"layers.{PLACES[int(found[1])]}", name)].copy_(tensor)
    folder = tmp_path_factory.mktemp("grown") / "target"
    model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(grown, tmp_path_factory) -> Path:
    """The grown target after a brief training of all its parameters: none of its blocks is idle any more."""
    folder = tmp_path_factory.mktemp("deep")
    recipe = folder / "deep.yaml"
    recipe.write_text(DEEP.format(start=grown))
    done = CliRunner().invoke(app, ["fit", str(recipe), "--runs", str(folder)])
    assert done.exit_code == 0, done.stderr
    return folder / "deep" / "drafter"


@torch.no_grad()
def changes(folder: Path, prompt: Prompt) -> list[float]:
    """Return by how much each block of a target changes the states of a text, relative to them."""
    target = Target.load(TargetSettings(model=str(folder)))
    tokens_BT = torch.tensor([prompt.tokens])
    needs = TargetNeeds(hidden=tuple(range(11)))
    hidden_BTD = target.read(tokens_BT, torch.arange(tokens_BT.shape[1])[None], needs).hidden_BTD
    return [float((hidden_BTD[i + 1] - hidden_BTD[i]).norm() / hidden_BTD[i].norm()) for i in range(10)]


def test_the_brief_training_leaves_no_block_idle(grown, deep, prompts):
    before, after = changes(grown, prompts[0]), changes(deep, prompts[0])
    assert [i for i, change in enumerate(before) if change == 0] == [i for i in range(10) if i not in PLACES]
    assert min(after) > 0.01
    states = [load_file(folder / "model.safetensors") for folder in (grown, deep)]
    assert [name for name in states[0] if torch.equal(states[0][name], states[1][name])] == []


def test_from_ten_layers_on_openvino_chooses_the_blocks_that_we_name(engine, deep, prompts, tmp_path):
    """Its own choice is [3, 6, 8] as the drafter's config counts them: with and without the note, the evaluator's counts."""
    target = Target.load(TargetSettings(model=str(deep)))
    drafter = folders.drafter_of("eagle3", target, scale=0.05, taps=[3, 6, 8], **SETTINGS["eagle3"])
    learn(drafter, target, prompts[:4], steps=STEPS, new_tokens=NEW_TOKENS, lr=3e-3)
    source, folder = folders.save(drafter, tmp_path / "drafter", target), tmp_path / "out"
    export_as("openvino", source, folder, target_config=read_target_config(deep, name="deep"))
    job = Job(deep, [p.tokens for p in prompts], NEW_TOKENS, [0.0, 1.0], "float32", 128)
    plain, drafter = plain_output(engine, job), read_drafter(source, target)

    def compared() -> Comparison:
        return compare_with_engine(
            engine, folder, drafter, target, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS, plain=plain
        )

    noted = compared()
    assert noted.problems == ()
    assert 0 < noted.greedy["engine"].accepted_at[1] < noted.greedy["engine"].num_drafts
    change_graph(folder, "1 4 6")
    assert "drafts differently from the evaluator" in compared().problems[0]
    forget_taps(folder)
    assert compared().greedy == noted.greedy


def test_the_command_line_exports_proves_and_writes_both_columns_into_the_card(engine, learned, tmp_path):
    source = Path(shutil.copytree(learned("eagle3"), tmp_path / "drafter"))
    words = [
        "export",
        str(source),
        "export.verify_prompts=2",
        "export.verify_tokens=16",
        "--to",
        "openvino",
        "--verify",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "openvino (openvino): passed" in done.stderr
    for folder in (source, tmp_path / "drafter.openvino"):
        (comparison,) = json.loads((folder / "engine.json").read_text())
        assert comparison["greedy"]["engine"] == comparison["greedy"]["evaluator"]
        card = (folder / "README.md").read_text()
        assert f"| temperature 0: drafts | {comparison['greedy']['engine']['num_drafts']} | " in card
        assert "It is not asked at temperature above 0." in card
