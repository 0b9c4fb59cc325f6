"""The comparison with an engine: it counts as engines count, passes on the same drafter, and fails on a damaged one."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.serving.comparison import compare
from drafttrain.serving.engines import Conventions, DecodedPrompt, Job
from drafttrain.serving.problems import count_problems
from drafttrain.serving.reference import TopKProposer, count_rounds, decode, evaluator_side
from drafttrain.serving.sides import Side
from drafttrain.target_model import Target, TargetSettings
from tests.export import folders
from tests.export.trained import learn
from tests.marks import long

NUM_DRAFT_TOKENS = 3
NEW_TOKENS = 14


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


def counted_by_hand(
    target: Target, drafter: Target, prompt: list[int], new_tokens: int, length: int, conventions: Conventions
) -> DecodedPrompt:
    """Decode greedily as engines do, without a cache: one token first, then drafts until the text is long enough or has ended."""

    def next_token(model: Target, tokens: list[int]) -> int:
        return int(model.model(torch.tensor([tokens])).logits[0, -1].argmax())

    tokens = [*prompt, next_token(target, prompt)]
    rounds = []
    while len(tokens) < len(prompt) + new_tokens and not conventions.end_tokens & {*tokens[len(prompt) :]}:
        fits = len(prompt) + new_tokens - len(tokens) - 1
        count = length if conventions.drafts_past_end else min(length, fits)
        drafted = list(tokens)
        for _ in range(count):
            drafted.append(next_token(drafter, drafted))
        accepted = 0
        while accepted < count and next_token(target, tokens) == drafted[len(tokens)]:
            if drafted[len(tokens)] in conventions.end_tokens:
                # It counts as the token that was not drafted.
                break
            tokens.append(drafted[len(tokens)])
            accepted += 1
        tokens.append(next_token(target, tokens))
        if count:
            rounds.append((count, accepted))
    text = tokens[len(prompt) :][:new_tokens]
    ended = [place for place, token in enumerate(text) if token in conventions.end_tokens]
    accepted_at = [
        sum(accepted >= i for _, accepted in rounds) for i in range(1, max((n for n, _ in rounds), default=0) + 1)
    ]
    return DecodedPrompt(
        text[: ended[0] + 1] if ended else text,
        len(rounds),
        sum(count for count, _ in rounds),
        sum(accepted for _, accepted in rounds),
        accepted_at,
    )


ENDS = frozenset(range(0, 257, 9))


@pytest.mark.parametrize(
    "conventions", [Conventions(), Conventions(drafts_past_end=False, end_tokens=ENDS)], ids=["vllm", "llama.cpp"]
)
def test_rounds_are_counted_as_an_engine_counts_them(conventions, target, prompts, tmp_path):
    folder = likely(target, tmp_path / "drafter")
    drafter, model = read_drafter(folder, target), Target.load(TargetSettings(model=str(folder)))
    lengths = {"max_new_tokens": NEW_TOKENS, "num_draft_tokens": NUM_DRAFT_TOKENS}
    outputs = decode(target, drafter, prompts, Sampling(), **lengths, conventions=conventions)
    ours = [count_rounds(one, max_new_tokens=NEW_TOKENS, conventions=conventions) for one in outputs]
    with torch.no_grad():
        wanted = [
            counted_by_hand(target, model, list(p.tokens), NEW_TOKENS, NUM_DRAFT_TOKENS, conventions) for p in prompts
        ]
    assert ours == wanted
    accepted = sum(one.num_accepted for one in wanted)
    assert 0 < accepted < sum(one.num_draft_tokens for one in wanted)
    assert bool(conventions.end_tokens) == any(len(one.tokens) < NEW_TOKENS for one in wanted)
    if conventions.drafts_past_end:
        # Some round was cut by the end: the output is shorter than what its rounds gave.
        assert sum(one.num_accepted + one.num_drafts + 1 for one in ours) > sum(len(one.tokens) for one in ours)


def test_with_top_k_1_a_drafter_samples_the_greedy_chain(target, prompts, tmp_path):
    drafter = read_drafter(likely(target, tmp_path / "drafter"), target)

    def drafted(proposer: Any, sampling: Sampling) -> list[int]:
        context = Context("0", list(prompts[0].tokens), len(prompts[0].tokens))
        proposer.begin([context], [])
        generator = torch.Generator().manual_seed(1)
        (proposal,) = proposer.propose([Budget(8, 8, 1)], sampling, [generator], lambda _: True)
        return proposal.tokens_N.tolist()

    greedy = drafted(drafter.proposer(target), Sampling())
    assert drafted(TopKProposer(drafter.proposer(target), 1), Sampling(1.0)) == greedy
    assert drafted(drafter.proposer(target), Sampling(1.0)) != greedy


@pytest.mark.long
def test_texts_that_ended_before_any_draft_do_not_count_in_the_difference(sides, target, prompts, job):
    ended = DecodedPrompt(sides.sampled[0].tokens[:1])
    short = replace(sides, sampled=[ended, *sides.sampled[1:]])
    found = compared(short, sides, target, prompts, job)
    rest = slice(1, None)
    whole = compared(
        *(
            replace(side, **{k: getattr(side, k)[rest] for k in ("plain", "greedy", "sampled")})
            for side in (sides, sides)
        ),
        target,
        prompts[1:],
        job,
    )
    assert found.difference == whole.difference


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
def damaged(eagle3, target, prompts, job, tmp_path_factory) -> Callable[[Any], Side]:
    """What the evaluator does with a copy that has a fault."""

    @functools.cache
    def side_of(fault: Any) -> Side:
        folder = folders.damage(Path(shutil.copytree(eagle3, tmp_path_factory.mktemp("fault") / "damaged")), fault)
        drafter = read_drafter(folder, target)
        return evaluator_side(target, drafter, prompts, job, num_draft_tokens=NUM_DRAFT_TOKENS)

    return side_of


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
    "fault",
    [folders.swap_columns, long(folders.alter_rope_everywhere), long(folders.flatten_hidden_norm), folders.swap_rows],
)
def test_a_damaged_drafter_changes_the_counts(fault, damaged, sides, target, prompts, job):
    found = compared(damaged(fault), sides, target, prompts, job)
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]
    assert found.json()["verdict"] == "failed"


def in_bfloat16(target: Target) -> Target:
    return Target(copy.deepcopy(target.model).bfloat16(), target.tokenizer, name="", fingerprint="")


@pytest.mark.parametrize("fault", [folders.swap_columns, folders.flatten_hidden_norm])
def test_a_damaged_drafter_is_seen_where_rounding_is_allowed(fault, damaged, sides, target, prompts, job):
    found = compared(damaged(fault), sides, in_bfloat16(target), prompts, job)
    assert any("block efficiency" in problem for problem in found.problems)


def test_only_prompts_with_equal_texts_are_counted(sides, target, prompts, job):
    """The evaluator's text with the drafter leaves its plain one at a near tie: its counters belong to another text."""
    apart = replace(sides.greedy[0], tokens=[*sides.greedy[0].tokens[:-1], 7], num_accepted=0)
    ours = replace(sides, greedy=[apart, *sides.greedy[1:]])
    found = compared(sides, ours, in_bfloat16(target), prompts, job)
    assert found.num_compared == len(prompts) - 1
    assert not found.problems
    assert f"on the {len(prompts) - 1} of {len(prompts)} prompts with equal texts" in str(found)
    # Control: with the same text, the other count is seen.
    same_text = replace(apart, tokens=sides.greedy[0].tokens)
    found = compared(sides, replace(sides, greedy=[same_text, *sides.greedy[1:]]), target, prompts, job)
    assert "drafts differently from the evaluator in 1 of 8 prompts" in found.problems[0]


def counted(accepted: list[int]) -> list[DecodedPrompt]:
    return [DecodedPrompt([1, 2, 3], 100, 300, number, [number, 0, 0]) for number in accepted]


def test_rounding_may_change_counters_in_both_directions_but_not_in_one():
    prompts = [Prompt(str(n), [1]) for n in range(8)]
    ours = counted([100, 120, 90, 110, 130, 80, 105, 115])

    def problems(added: list[int], places: range = range(8)) -> list[str]:
        theirs = [replace(one, num_accepted=one.num_accepted + more) for one, more in zip(ours, added, strict=True)]
        return count_problems({"engine": theirs, "evaluator": ours}, prompts, places, "vllm", 0.02)

    assert not problems([1, -2, 0, 1, 2, -1, 0, -1])
    # More than 2 %, but as often up as down.
    assert not problems([-19, 9, -14, 7, -21, 8, -10, 3])
    (one_way,) = problems([-6, -7, -5, -6, -8, -6, -5, -7])
    assert "more than by chance (p = " in one_way
    (few,) = problems([-60, -7, 0, 0, 0, 0, 0, 0], range(2))
    assert "on the 2 of 8 prompts with equal texts a difference cannot be told from chance: 6 of 8 texts differ" in few


def test_output_that_differs_from_the_targets_fails(sides, target, prompts, job):
    wrong = replace(sides.greedy[0], tokens=[7, *sides.greedy[0].tokens[1:]])
    lossy = compared(replace(sides, greedy=[wrong, *sides.greedy[1:]]), sides, target, prompts, job)
    assert lossy.num_compared == len(prompts) - 1
    assert "with the drafter differs from its output without" in lossy.problems[0]
    other_target = [replace(one, tokens=[9, *one.tokens[1:]]) for one in sides.plain]
    strange = compared(replace(sides, plain=other_target, greedy=other_target), sides, target, prompts, job)
    assert "without a drafter differs from that of the evaluator's target" in strange.problems[0]
    assert "no prompt is left" in strange.problems[1]


def test_an_engine_with_another_acceptance_rate_fails(sides, target, prompts, job):
    lucky = [replace(one, num_accepted=one.num_draft_tokens) for one in sides.sampled]
    found = compared(replace(sides, sampled=lucky), sides, target, prompts, job)
    assert len(found.problems) == 1
    assert "at temperature 1 vllm accepts differently" in found.problems[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_never_drafts_fails(dtype, sides, target, prompts, job):
    """llama.cpp without a type of speculation, for one: it loads the drafter and does not ask it."""
    plain = [DecodedPrompt(one.tokens) for one in sides.greedy]
    target = target if dtype == torch.float32 else in_bfloat16(target)
    found = compared(replace(sides, greedy=plain), sides, target, prompts, job)
    assert any("did not draft: its counters are zero" in problem for problem in found.problems)
    undrafted = replace(sides, sampled=[DecodedPrompt(one.tokens) for one in sides.sampled])
    found = compared(undrafted, sides, target, prompts, job)
    assert any("at temperature 1 vllm did not draft" in problem for problem in found.problems)


def test_sampled_text_from_another_distribution_fails(sides, target, prompts, job):
    """What a wrong temperature, or noise in its place, does to the text; acceptance alone would not show it."""
    generator = torch.Generator().manual_seed(1)
    noise = [
        replace(one, tokens=torch.randint(1, 257, (NEW_TOKENS,), generator=generator).tolist()) for one in sides.sampled
    ]
    found = compared(replace(sides, sampled=noise), sides, target, prompts, job)
    assert len(found.problems) == 1
    assert "vllm does not sample from the target's distribution" in found.problems[0]
