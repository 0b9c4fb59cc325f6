"""The comparison with an engine: it counts as engines count, passes on the same drafter, and tells a damaged one apart."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.records import Prompt, Sampling
from drafttrain.export.engines import Job
from drafttrain.export.verify import Served, Side, compare, decode, evaluator_side, served_counts
from drafttrain.target import Target, TargetSettings
from tests.export import folders
from tests.export.trained import learn

NUM_DRAFT_TOKENS = 3
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    return [Prompt(str(n), torch.randint(1, 257, (n % 5 + 2,), generator=generator).tolist()) for n in range(8)]


@pytest.fixture(scope="module")
def job(prompts) -> Job:
    return Job(Path(), [p.tokens for p in prompts], NEW_TOKENS, [0.0, 1.0], "float32", 64)


def likely(target: Target, folder: Path) -> Path:
    """Write a drafter that is often right and often wrong: the target itself, a little of its weights noise."""
    folders.save(folders.drafter_of("causal_lm", target), folder, target)
    torch.manual_seed(3)
    model = type(target.model)(target.model.config)
    model.load_state_dict(target.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def counted_by_hand(target: Target, drafter: Target, prompt: list[int], new_tokens: int, length: int) -> Served:
    """Decode greedily as vLLM does, without a cache: one token first, then drafts of full length until the text is long enough."""

    def next_token(model: Target, tokens: list[int]) -> int:
        return int(model.model(torch.tensor([tokens])).logits[0, -1].argmax())

    tokens = [*prompt, next_token(target, prompt)]
    accepted_by_round = []
    while len(tokens) < len(prompt) + new_tokens:
        drafted = list(tokens)
        for _ in range(length):
            drafted.append(next_token(drafter, drafted))
        kept = 0
        while kept < length and next_token(target, tokens) == drafted[len(tokens)]:
            tokens.append(drafted[len(tokens)])
            kept += 1
        tokens.append(next_token(target, tokens))
        accepted_by_round.append(kept)
    return Served(
        tokens[len(prompt) :][:new_tokens],
        len(accepted_by_round),
        length * len(accepted_by_round),
        sum(accepted_by_round),
        [sum(kept >= i for kept in accepted_by_round) for i in range(1, length + 1)],
    )


def test_rounds_are_counted_as_an_engine_counts_them_past_the_end_and_behind_the_first_token(target, prompts, tmp_path):
    folder = likely(target, tmp_path / "drafter")
    drafter, model = read_drafter(folder, target), Target.load(TargetSettings(model=str(folder)))
    outputs = decode(target, drafter, prompts, Sampling(), max_new_tokens=NEW_TOKENS, num_draft_tokens=NUM_DRAFT_TOKENS)
    ours = [served_counts(one, max_new_tokens=NEW_TOKENS) for one in outputs]
    with torch.no_grad():
        wanted = [counted_by_hand(target, model, list(p.tokens), NEW_TOKENS, NUM_DRAFT_TOKENS) for p in prompts]
    assert ours == wanted
    accepted = sum(one.num_accepted for one in wanted)
    assert 0 < accepted < sum(one.num_draft_tokens for one in wanted)
    # Some round was cut by the end: the output is shorter than what its rounds gave.
    assert sum(one.num_accepted + one.num_drafts + 1 for one in ours) > sum(len(one.tokens) for one in ours)


def compared(theirs, ours, target, prompts, job):
    names = {"engine": "vllm", "version": "1", "repaired": (), "num_draft_tokens": NUM_DRAFT_TOKENS, "draft": "sampled"}
    return compare(theirs, ours, target, prompts, job, **names)


@pytest.fixture(scope="module")
def eagle3(target, prompts, tmp_path_factory) -> Path:
    """An EAGLE-3 drafter that has learned some of what the target writes."""
    drafter = folders.drafter_of("eagle3", target, draft_vocab_size=None, num_steps=2)
    learn(drafter, target, prompts, steps=40, new_tokens=NEW_TOKENS, lr=5e-3)
    return folders.save(drafter, tmp_path_factory.mktemp("learned") / "drafter", target)


@pytest.fixture(scope="module")
def sides(eagle3, target, prompts, job) -> Side:
    """What the evaluator does with it; handed to the comparison as the engine's too."""
    return evaluator_side(target, read_drafter(eagle3, target), prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS)


def test_a_drafter_is_equal_to_itself(sides, target, prompts, job):
    same = compared(sides, sides, target, prompts, job)
    assert not same.problems
    assert same.greedy["engine"] == same.greedy["evaluator"]
    assert 0 < same.greedy["engine"].num_accepted < same.greedy["engine"].num_draft_tokens
    assert same.json()["verdict"] == "passed"


@pytest.mark.parametrize(
    "fault", [folders.swap_columns, folders.alter_rope_everywhere, folders.flatten_hidden_norm, folders.swap_rows]
)
def test_a_damaged_drafter_is_told_apart_by_its_counters(fault, eagle3, sides, target, prompts, job, tmp_path):
    damaged = folders.damage(Path(shutil.copytree(eagle3, tmp_path / "damaged")), fault)
    other = evaluator_side(target, read_drafter(damaged, target), prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS)
    found = compared(other, sides, target, prompts, job)
    assert found.lossless.exact
    assert "drafts otherwise than the evaluator" in found.problems[0]
    assert found.json()["verdict"] == "failed"


def test_output_that_is_not_the_engines_own_is_told(sides, target, prompts, job):
    wrong = replace(sides.greedy[0], tokens=[7, *sides.greedy[0].tokens[1:]])
    lossy = compared(replace(sides, greedy=[wrong, *sides.greedy[1:]]), sides, target, prompts, job)
    assert "does not write what it writes without" in lossy.problems[0]
    other_target = [replace(one, tokens=[9, *one.tokens[1:]]) for one in sides.plain]
    strange = compared(replace(sides, plain=other_target, greedy=other_target), sides, target, prompts, job)
    assert "does not write what the evaluator's target writes" in strange.problems[0]
    assert "no prompt is left" in strange.problems[1]


def test_an_engine_that_accepts_by_another_law_is_told_apart(sides, target, prompts, job):
    lucky = [replace(one, num_accepted=one.num_draft_tokens) for one in sides.sampled]
    found = compared(replace(sides, sampled=lucky), sides, target, prompts, job)
    assert len(found.problems) == 1
    assert "at temperature 1 vllm accepts otherwise" in found.problems[0]


def test_a_sampled_text_that_is_not_of_the_targets_law_is_told_apart(sides, target, prompts, job):
    """What a wrong temperature, or noise in its place, does to the text; acceptance alone would not show it."""
    generator = torch.Generator().manual_seed(1)
    noise = [
        replace(one, tokens=torch.randint(1, 257, (NEW_TOKENS,), generator=generator).tolist()) for one in sides.sampled
    ]
    found = compared(replace(sides, sampled=noise), sides, target, prompts, job)
    assert len(found.problems) == 1
    assert "vllm does not write the target's law" in found.problems[0]
