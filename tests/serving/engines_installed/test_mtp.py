"""vLLM drafts with a stitched next-token-prediction layer like the embedded evaluator. Needs its environment: make test-serving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Prompt
from drafttrain.drafters import drafters
from drafttrain.environments.environment import check_installed
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.serving.comparison import Comparison, compare_with_engine
from drafttrain.serving.engines import Job, ServingEngine, engine_of
from drafttrain.serving.reference import evaluator_side
from drafttrain.serving.sides import sum_counts
from drafttrain.target_model import Target
from tests.drafters.mtp_models import loaded, mimo_folder, with_config
from tests.export import folders
from tests.export.trained import learn

pytestmark = pytest.mark.serving

NEW_TOKENS = 40
NUM_DRAFT_TOKENS = 3


@pytest.fixture(scope="module")
def engine() -> ServingEngine:
    """The engine; if it is not installed, the tests fail."""
    vllm = engine_of("vllm")
    check_installed(vllm.environment)
    return vllm


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [Prompt(str(i), torch.randint(1, 257, (12,), generator=generator).tolist()) for i in range(6)]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiMo model under the model type that vLLM's own transformers knows; vLLM goes by `architectures`."""
    return with_config(mimo_folder(tmp_path_factory.mktemp("mimo") / "target"), model_type="qwen2")


@pytest.fixture(scope="module")
def target(target_folder) -> Target:
    return loaded(target_folder, dtype="float32")


@pytest.fixture(scope="module")
def learned(target, prompts, tmp_path_factory) -> Path:
    """The folder of a drafter that has learned half of the texts by heart, from the layer in the checkpoint."""
    entry: Any = drafters.entry("mtp")
    drafter = entry.component.create(entry.settings(num_steps=3), target=target, tokenizer=target.tokenizer)
    learn(drafter, target, prompts[:3], steps=100, new_tokens=NEW_TOKENS, lr=3e-3)
    return folders.save(drafter, tmp_path_factory.mktemp("learned") / "drafter", target)


@pytest.fixture(scope="module")
def job(target_folder, prompts) -> Job:
    return Job(target_folder, [prompt.tokens for prompt in prompts], NEW_TOKENS, [0.0, 1.0], "float32", 128)


@pytest.fixture(scope="module")
def found(engine, learned, target, target_folder, prompts, job, tmp_path_factory) -> Comparison:
    """vLLM on the stitched checkpoint, compared with the evaluator on the drafter folder."""
    exported = tmp_path_factory.mktemp("stitched") / "out"
    export_as("checkpoint", learned, exported, target_config=read_target_config(target_folder, name="target"))
    drafter = read_drafter(learned, target)
    return compare_with_engine(engine, exported, drafter, target, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS)


def test_vllm_gives_the_same_tokens_and_the_same_counts(found):
    assert found.problems == ()
    assert found.lossless.exact
    assert found.same_target.exact
    theirs, ours = found.greedy["engine"], found.greedy["evaluator"]
    assert theirs == ours
    # The comparison is meaningful only if drafts are accepted, rejected, and accepted beyond the first.
    assert 0 < theirs.accepted_at[1] < theirs.accepted_at[0] < theirs.num_drafts


@pytest.mark.parametrize("wrong", [{"hidden_first": False}, {"feature": "after_norm"}])
def test_control_with_another_detail_of_the_layout_the_evaluator_counts_differently(
    wrong, found, learned, target, prompts, job
):
    drafter = read_drafter(learned, target)
    drafter.config.update(wrong)
    side = evaluator_side(
        target, drafter, prompts, replace(job, temperatures=[0.0, 0.0]), num_draft_tokens=NUM_DRAFT_TOKENS
    )
    assert sum_counts(side.greedy, NUM_DRAFT_TOKENS) != found.greedy["engine"]
