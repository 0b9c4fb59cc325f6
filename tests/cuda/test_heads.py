"""A recipe of every kind of head on one GPU: labels, training where the target is, export, and what the head decides in decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.config.load import read_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.annotate import annotators
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.head_figures import head_figures
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.heads import heads
from drafttrain.pipeline.head_run import HeadRun
from drafttrain.target_model import Target
from tests.cuda.kinds import write_texts
from tests.cuda.models import PROMPTS, engine

pytestmark = pytest.mark.pretended_cuda


def annotator_of(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (annotator, source) that label for a kind of head without an answer to be checked."""
    names = [name for name in annotators.names() if annotators.entry(name).component.for_head == kind]
    if "marked" not in names:
        return {"kind": names[0]}, {"kind": "text", "path": str(folder / "text.txt")}
    path = folder / "marked.jsonl"
    errors = [{"errors": [[5, 9]]}, {"errors": []}]
    lines = [
        {"id": str(number), "prompt": "this is", "completion": f"number {number}, which follows", **errors[number % 2]}
        for number in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {"kind": "marked", "path": str(path)}, {"kind": "jsonl", "path": str(path)}


def recipe_of(kind: str, *, target: Path, drafter: Path, folder: Path) -> Recipe:
    annotator, source = annotator_of(kind, folder)
    prompts = str(folder / "prompts.jsonl")
    content = {
        "name": "head",
        "target": {"model": str(target), "device": "cuda:0", "dtype": "bfloat16"},
        "head": {"kind": kind, "drafter": str(drafter)},
        "data": {"max_length": 40, "sources": [source], "annotate": {**annotator, "held_out": 0.3}},
        "train": {
            **{"max_steps": 3, "batch_size": 8, "records_per_device": 4, "warmup_steps": 0, "eval_every_steps": 2},
            **{"checkpoint_every_steps": 2, "log_every_steps": 1, "loggers": ["csv"], "precision": "bf16-mixed"},
        },
        "eval": {"prompts": prompts, "validation_prompts": prompts, "prompt_tokens": 6},
    }
    return read_recipe(json.dumps(content), source=kind)


@pytest.mark.parametrize("kind", heads.names())
def test_every_head_is_trained_where_its_target_is(
    kind: str, tmp_path: Path, target_folder: Path, target: Target, drafter_of: Any, save_llama: Any
) -> None:
    write_texts(tmp_path)
    drafter = save_llama(seed=0, num_layers=1)
    run = HeadRun(recipe_of(kind, target=target_folder, drafter=drafter, folder=tmp_path), tmp_path / "run")
    labelled = run.label()
    devices = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: devices.append(inputs[0].device.type) if type(module) is head_class else None
    )
    head_class = heads.entry(kind).component
    run.fit_head(labelled)
    hook.remove()
    assert set(devices) == {"cuda"}
    run.export_best()
    figures = head_figures(run.folder.head, run.folder.start, labelled.held_out, kind=kind)
    assert figures.rows > 0
    decode_with(kind, str(run.folder.head), target, drafter_of("causal_lm"))


def decode_with(kind: str, head: str, target: Target, drafter: Drafter) -> None:
    """Decode with what the head decides: the length of drafts, or which tokens stay."""
    length: Any = FixedLengthSettings(2)
    rule: Any = LosslessSettings()
    if kind == "acceptance":
        length = length_policies.entry("cumulative_reject").settings(head=head)
    else:
        rule = acceptance_rules.entry(kind).settings(head=head)
    loop = engine(target, drafter.proposer(target), length=length, rule=rule, sampling=Sampling())
    assert all(one.tokens for one in loop.generate(PROMPTS))
