"""Hugging Face's assisted generation and the evaluator: the same tokens and counts, observed from outside of `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt
from drafttrain.serving.comparison import compare
from drafttrain.serving.engines import Conventions, Job, Use, engine_of
from drafttrain.serving.engines.transformers_worker import Rounds, answer_to
from drafttrain.serving.reference import evaluator_side
from drafttrain.serving.sides import Side
from tests.export import folders
from tests.serving.test_comparison import likely

NUM_DRAFT_TOKENS = 3
NEW_TOKENS = 14
ENGINE = engine_of("transformers")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    return [Prompt(str(n), torch.randint(1, 257, (n % 5 + 2,), generator=generator).tolist()) for n in range(5)]


@pytest.fixture(scope="module")
def job(target, prompts) -> Job:
    return Job(Path(target.name), [p.tokens for p in prompts], NEW_TOKENS, [0.0, 1.0], "float32", 64)


@pytest.fixture(scope="module")
def drafter(target, tmp_path_factory) -> Path:
    return likely(target, tmp_path_factory.mktemp("likely") / "drafter")


def served(job: Job, folder: Path | None) -> list:
    """Return what `generate` does, in this process: the worker's own code."""
    use = None if folder is None else Use(str(folder), "causal_lm", NUM_DRAFT_TOKENS, "sampled")
    return ENGINE.decoded(answer_to(ENGINE.request(job, use)))


@pytest.fixture(scope="module")
def theirs(job, drafter) -> Side:
    (plain, _), (greedy, sampled) = served(job, None), served(job, drafter)
    return Side(plain, greedy, sampled)


@pytest.fixture(scope="module")
def ours(target, drafter, prompts, job) -> Side:
    return evaluated(target, drafter, prompts, job, ENGINE.conventions(job.target))


def evaluated(target, drafter: Path, prompts, job, conventions: Conventions) -> Side:
    drafter = read_drafter(drafter, target)
    return evaluator_side(target, drafter, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS, conventions=conventions)


def compared(theirs: Side, ours: Side, target, prompts, job):
    names = {"engine": "transformers", "version": "1", "repaired": (), "draft": "sampled"}
    return compare(theirs, ours, target, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS, **names)


def test_generate_and_the_evaluator_agree_in_tokens_and_counts(theirs, ours, target, prompts, job):
    found = compared(theirs, ours, target, prompts, job)
    assert found.problems == ()
    assert found.greedy["engine"] == found.greedy["evaluator"]
    counts = found.greedy["engine"]
    assert 0 < counts.num_accepted < counts.num_draft_tokens
    assert 0 < counts.accepted_at[1] < counts.accepted_at[0]


@pytest.mark.parametrize("conventions", [Conventions(drafts_past_end=False), Conventions(first_token_alone=False)])
def test_other_conventions_give_other_counts(conventions, theirs, target, drafter, prompts, job):
    found = compared(theirs, evaluated(target, drafter, prompts, job, conventions), target, prompts, job)
    assert "transformers drafts differently from the evaluator" in found.problems[0]


def test_a_damaged_drafter_changes_the_counts(theirs, ours, target, prompts, job, tmp_path):
    damaged = likely(target, tmp_path / "drafter")
    folders.damage(damaged, folders.alter_rope_everywhere)
    (greedy,) = served(replace(job, temperatures=[0.0]), damaged)
    found = compared(replace(theirs, greedy=greedy), ours, target, prompts, job)
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]


def test_rounds_that_do_not_add_up_are_refused():
    rounds = Rounds(prompt_length=2)
    for length in (5, 4):
        rounds.before_forward(None, (), {"input_ids": torch.zeros(1, length)})
    for tokens in ([0, 0], [7, 8], [9]):
        rounds.put(torch.tensor(tokens))
    assert rounds.counters([7, 8, 9]) == {
        "num_drafts": 2,
        "num_draft_tokens": 6,
        "num_accepted": 1,
        "accepted_at": [1, 0, 0],
    }
    with pytest.raises(RuntimeError, match="the streamer got"):
        rounds.counters([7, 8])


def test_other_kinds_are_refused_with_the_engines_that_run_them():
    with pytest.raises(
        CheckpointError, match=r"transformers runs no drafter of kind medusa, only causal_lm\. Engines for medusa: vllm"
    ):
        ENGINE.check_kind(Path("somewhere"), "medusa")
