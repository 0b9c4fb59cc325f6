"""Training under torch.compile: the same curve, weights under the same names, checkpoints that either continues."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError, RecipeError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.medusa.settings import JointSettings
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.pipeline.data import FEW_WIDTHS, FEW_WIDTHS_IN_HALF, own_batches
from drafttrain.target_model import Target
from drafttrain.training import compiled
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.training.layouts import run

KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("causal_lm", {"hidden_size": 48, "num_heads": 3, "num_layers": 2}, "tvdpp"),
    ("kangaroo", {}, "forward_kl"),
    ("medusa", {"num_heads": 2}, "ce"),
    ("medusa", {"num_heads": 2, "joint": JointSettings(lora=LoraSettings(rank=2, dropout=0.0))}, "ce"),
    ("eagle", {"num_steps": 2, "feature_noise": 0.0}, "lk_hybrid"),
    ("eagle3", {"num_steps": 3, "draft_vocab_size": 100}, "lk_hybrid"),
    ("p_eagle", {"num_layers": 2, "num_depths": 3, "mask_token_id": 0}, "forward_kl"),
    ("mtp", {"init": "random", "num_steps": 2}, "forward_kl"),
    ("dflash", {"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0}, "ce"),
    (
        "domino",
        {
            **{"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0},
            **{"gru_hidden_dim": 8, "emb_dim": 4},
        },
        "ce",
    ),
    (
        "xpress",
        {
            **{"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0},
            **{"rank": 8, "mlp_hidden": 16},
        },
        "ce",
    ),
    (
        "dflash2",
        {
            **{"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0},
            **{"selector_rank": 4, "selector_top_k": 40},
        },
        "ce",
    ),
    ("dspark", {"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0}, "tvd"),
    ("chimera", {"num_steps": 3, "draft_vocab_size": 100}, "forward_kl"),
    ("hidden_transfer", {"num_steps": 2}, "forward_kl"),
    ("sorted_lm", {"hidden_size": 48, "num_heads": 3, "num_layers": 2}, "forward_kl"),
    ("matformer", {"hidden_size": 48, "num_heads": 3, "num_layers": 2, "distill": 0.5}, "forward_kl"),
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile without a compiler: functions are traced, and their graphs run as they are. Returns what was compiled."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(str(graph.graph))
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    return found


def curve_of(folder: Path, kind: str, of_kind: dict[str, Any], loss: str, **settings: Any) -> list[float]:
    return run(folder, kind=kind, of_kind=of_kind, loss=loss, **{"steps": 3} | settings)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "of_kind", "loss"), KINDS)
def test_the_curve_is_that_of_a_training_that_is_not_compiled(kind, of_kind, loss, traced, tmp_path):
    plain = curve_of(tmp_path / "plain", kind, of_kind, loss)
    assert not traced
    fast = curve_of(tmp_path / "fast", kind, of_kind, loss, compile=True)
    assert fast == pytest.approx(plain, abs=1e-5)
    assert len(traced) >= 2, "the drafter and the loss"


@pytest.mark.long
def test_a_compiled_training_continues_one_that_was_not(traced, tmp_path):
    whole = curve_of(tmp_path / "whole", *KINDS[0], steps=6)
    curve_of(tmp_path / "parts", *KINDS[0], steps=3)
    (tmp_path / "parts" / "train.json").unlink()
    assert curve_of(tmp_path / "parts", *KINDS[0], steps=6, compile=True) == pytest.approx(whole, abs=1e-5)
    assert len(traced) >= 2, "the drafter and the loss"
    stored = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts")]
    assert stored[0].keys() == stored[1].keys()
    for name, weight in stored[0].items():
        torch.testing.assert_close(stored[1][name], weight, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in (KINDS[5], KINDS[8]))],
    ids=lambda kind: kind[0],
)
def test_rows_of_every_shape_run_in_the_graphs_of_the_first_steps(kind, traced):
    """Chats of all lengths, packed: the number of rows and their length change from step to step."""
    graphs, shapes = graphs_by_step(kind, traced)
    assert len(set(shapes[4:]) - set(shapes[:4])) >= 2, "shapes that no compiled step has had"
    assert len(set(graphs[3:])) == 1


@pytest.mark.long
def test_control_without_symbols_a_new_shape_is_a_new_graph(traced, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, dynamic=False))
    monkeypatch.setattr(compiled, "_compiled_loss", lambda per_row: per_row)
    graphs, _ = graphs_by_step(KINDS[0], traced)
    assert graphs[-1] > graphs[3]


def graphs_by_step(kind: tuple[str, dict[str, Any], str], traced: list[str]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return how many graphs there are after each step, and the shape of its rows."""
    name, of_kind, loss_kind = kind
    target = Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")
    entry: Any = drafters.entry(name)
    drafter = entry.component.create(entry.settings(**of_kind), target=target, tokenizer=target.tokenizer).train()
    drafter.fit_vocabulary(lambda: np.arange(257))
    loss = losses.build(losses.entry(loss_kind).settings())
    compiled.compile_step(drafter, loss)
    random = np.random.default_rng(0)
    graphs, shapes = [], []
    for step in range(10):
        lengths = random.integers(6, 60, size=6)
        records = [
            Record("", random.integers(1, 250, size=n).tolist(), [False] * 3 + [True] * (n - 3)) for n in lengths
        ]
        batch, _ = pack(records, width=96, multiple=16, weight_of_step=1.0, step=step)
        batch = with_plan(drafter, loss, replace(batch, num_steps=20))
        needs = drafter.needs() | TargetNeeds(final=True)
        seen = target.read(batch.tokens_BT, batch.positions_BT, needs, documents=batch.packed_documents)
        batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
        batch_loss(drafter, loss, batch, vocab_size=target.num_tokens).total.backward()
        graphs.append(len(traced))
        shapes.append(tuple(batch.tokens_BT.shape))
    return graphs, shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "of_kind", "loss"), [(None, *kind) for kind in KINDS] + [(stage, *KINDS[5]) for stage in (0, 2)]
)
def test_every_kind_with_the_compiler_of_this_machine(stage, kind, of_kind, loss, tmp_path):
    if reason := compiled.why_no_compiler(torch.device("cpu")):
        pytest.skip(reason)
    torch._dynamo.reset()
    plain = curve_of(tmp_path / "plain", kind, of_kind, loss, stage=stage)
    fast = curve_of(tmp_path / "fast", kind, of_kind, loss, stage=stage, compile=True)
    assert fast == pytest.approx(plain, abs=1e-4)


def test_every_shipped_kind_has_parts_that_are_compiled():
    """A kind from outside that names none is refused by name."""
    kinds = [drafters.entry(name).component for name in drafters.names()]
    own = [kind for kind in kinds if kind.__module__.startswith("drafttrain.") and not kind.searched]
    cannot = {kind.kind for kind in own if not kind.compiles}
    assert cannot == {"early_exit", "consistency", "lexical_units"}, "their weights are the target's"
    assert not Drafter.compiles


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("tiny_acceptance", [], "a head has no part to compile"),
        ("online", [], "online learning has no part to compile"),
        ("demo", ["train.deepspeed={stage: 3}"], "use stage 0, 1 or 2"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(recipe, overrides, said):
    with pytest.raises(RecipeError, match=r"compile.*" + said):
        load_recipe(recipe, ["train.compile=true", *overrides])


def test_without_a_compiler_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(DrafttrainError, match=r"train\.compile: there is no C\+\+ compiler"):
        curve_of(tmp_path, *KINDS[0], compile=True)


def test_rows_of_a_compiled_training_have_few_widths():
    asked: list[int] = []
    data = SimpleNamespace(of_step=lambda step, **keywords: asked.append(keywords["multiple"]))
    for settings in (TrainSettings(), TrainSettings(compile=True), TrainSettings(precision="bf16-mixed")):
        own_batches(data, settings, device=torch.device("cpu"))(0)
    assert asked == [1, FEW_WIDTHS, FEW_WIDTHS_IN_HALF]


def test_a_run_may_be_compiled_from_one_day_to_the_next():
    assert replace(TrainSettings(), compile=True).without_layout() == TrainSettings().without_layout()
