"""What a recipe with answers of the drafter in training must not have, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.config.load import load_recipe, read_recipe
from drafttrain.config.smoke import shrink
from drafttrain.core.errors import RecipeError

RECIPE = """
name: x
target: {model: builtin:target}
drafter: {kind: causal_lm}
loss: {kind: forward_kl}
data:
  max_length: 64
  sources: [{kind: stdlib}]
  on_policy: {min_prompt_tokens: 24}
"""
HEAD = ["drafter=null", "loss=null", "head={kind: acceptance}", "data.annotate={kind: acceptance}"]
SUM = "loss={kind: sum, terms: [{loss: {kind: tvd}}, {loss: {kind: ce}, weight: 0.1}]}"
REFUSED = {
    "a loss of labels": (["loss={kind: ce}"], "loss ce trains the labels themselves"),
    "such a loss in a sum": ([SUM], "loss ce trains the labels themselves"),
    "such a loss inside another": (["loss={kind: d_pace, loss: {kind: ce}}"], "loss ce trains the labels themselves"),
    "a kind that reads the target": (["drafter={kind: eagle3}"], "drafter.kind eagle3 drafts from the target's hidden"),
    "a head": (HEAD, "a head is trained on labelled draft tokens"),
    "a cache": (["data.cache=states"], "data.cache must be none, got states"),
    "online learning": (["online={}"], "online learning reads the text that was served"),
    "no target": (["target={model: null, tokenizer: 'builtin:target'}"], "but target.model is null"),
    "a sharded target": (["train.target_placement=sharded"], "must be replicated, got sharded"),
    "an absent target": (["train.target_placement=absent", "data.cache=full"], "must be replicated, got absent"),
    "partitioned weights": (["train.deepspeed={stage: 3}"], "partitioned over processes writes no text"),
    "compiled layers": (["train.compile=true"], "train.compile"),
    "dropout of adapters": (
        ["drafter={kind: causal_lm, init: checkpoint, checkpoint: 'builtin:drafter', lora: {dropout: 0.1}}"],
        "drafter.lora.dropout is for the tokens of a training step, not for draws: set 0, got 0.1",
    ),
    "a tokenizer of its own": (["drafter.tokenizer=builtin:target"], "writes no tokens of the target"),
    "no room": (["data.on_policy.min_prompt_tokens=64"], "64 leave no room for an answer within max_length 64"),
}


def problems(*overrides: str) -> list[str]:
    try:
        read_recipe(RECIPE, overrides, source="x")
    except RecipeError as error:
        return str(error).splitlines()[1:]
    return []


def test_a_recipe_with_answers_of_its_drafter_is_valid() -> None:
    assert problems() == []
    assert problems("data.on_policy={fraction: 0.5, drafter_share: 0.5, every_steps: 4}") == []
    assert read_recipe(RECIPE, source="x").data.on_policy.fraction == 1.0  # type: ignore[union-attr]
    small = shrink(read_recipe(RECIPE, source="x")).data.on_policy
    assert small is not None
    assert (small.max_new_tokens, small.min_prompt_tokens) == (16, 24)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(case: str) -> None:
    overrides, reason = REFUSED[case]
    found = problems(*overrides)
    assert any("data.on_policy" in problem and reason in problem for problem in found), found
    if case != "no room":
        # Control: a recipe that draws nothing may have it.
        assert not any("data.on_policy" in problem for problem in problems(*overrides, "data.on_policy.fraction=0"))


def test_all_reasons_are_named_at_once() -> None:
    found = problems("loss={kind: ce}", "data.cache=states", "train.deepspeed={stage: 3}")
    assert len([problem for problem in found if "data.on_policy" in problem]) == 3


@pytest.mark.parametrize("arm", ["fraction=0", "drafter_share=0", "fraction=0.5", "drafter_share=0.5", "temperature=0"])
def test_every_arm_of_the_benchmark_is_a_recipe(arm: str) -> None:
    base = Path(__file__).parents[2] / "benchmarks" / "distillspec.yaml"
    for loss in ("forward_kl", "reverse_kl", "jsd", "tvd", "tvdpp"):
        load_recipe(base, [f"data.on_policy.{arm}", f"loss.kind={loss}"])
    load_recipe(base, ["drafter.init=scratch", "drafter.checkpoint=null", "loss.kind=ce", "data.on_policy.fraction=0"])
