"""Steps of a real model: forks of the cache, the distribution of steps, what is counted, rewards by a classifier, the frontier.

V = vocabulary
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import drafttrain
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.search.frontier import METHODS, search_frontier
from drafttrain.eval.search.methods import Question
from drafttrain.eval.search.rewards import ClassifierReward
from drafttrain.eval.search.steps import SampledSteps
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.forked_cache import cached_text, continue_from
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import greedy, noisy

TOKENS = [7, 3, 3, 9, 11, 2, 5, 8]
PROMPT = Prompt("a", [5, 9, 40, 33, 7])


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


def sampled(target: Target, proposer: Any = None, **changed: Any) -> SampledSteps:
    given = {"sampling": Sampling(1.0), "delimiter": "\n", "max_step_tokens": 6, "max_new_tokens": 18} | changed
    return SampledSteps(target, proposer or NoDraft(), **given)


def test_forks_continue_as_the_text_itself(target):
    lm = CachedLM(target.model, name="target")
    lm.begin([TOKENS])
    fork = cached_text(lm, 6)
    whole = lm.forward([[4, 4]])[0].logits_BTV
    for start, tokens in ((TOKENS[6:], [4, 4]), ([1], [2, 3])):
        # The first of two forks does not change the second one.
        continue_from(lm, fork)
        lm.forward([start])
        lm.keep([list(range(len(start)))])
        found = lm.forward([tokens])[0].logits_BTV
        own = CachedLM(target.model, name="target")
        own.begin([[*TOKENS[:6], *start]])
        torch.testing.assert_close(found, own.forward([tokens])[0].logits_BTV, atol=1e-9, rtol=0)
    assert not torch.allclose(found, whole, atol=1e-3), "control: another text"


@pytest.mark.parametrize("drafted", [False, True])
def test_greedy_steps_join_to_the_greedy_text(target, drafted):
    proposer = CausalLMDrafter(noisy(target.model, 0.03)).proposer(target) if drafted else None
    steps = sampled(target, proposer, sampling=Sampling(0.0))
    partial, number = steps.start(PROMPT), 0
    while not partial.ended:
        # Twice from the same fork: the second continuation goes on.
        first, partial = steps.next(partial, 1), steps.next(partial, 2)
        assert first.tokens == partial.tokens
        number += 1
        assert partial.cache.length == len(partial.tokens) - 1
    wanted = greedy(target, PROMPT, 18, stop=0)
    assert list(partial.tokens[len(PROMPT.tokens) :]) == wanted
    assert number >= 3


def test_every_target_token_is_counted_once_and_prompts_are_not(target):
    steps = sampled(target)
    start = steps.start(PROMPT)
    assert steps.spent == 0
    one, other = steps.next(start, 1), steps.next(start, 2)
    written = len(one.tokens) + len(other.tokens) - 2 * len(start.tokens)
    assert steps.spent == written, "plain decoding reads a token for every new one: the fork is not read again"
    if not one.ended:
        third = steps.next(one, 3)
        assert steps.spent == written + len(third.tokens) - len(one.tokens)
    drafting = sampled(
        target, CausalLMDrafter(noisy(target.model, 0.5)).proposer(target), policy=FixedLength(FixedLengthSettings(3))
    )
    for number in (1, 2):
        drafting.next(drafting.start(PROMPT), number)
    assert drafting.spent > written, "control: rejected draft tokens are target tokens too"


def test_steps_are_drawn_from_the_targets_distribution_also_when_drafted():
    target = Target(
        random_llama(num_layers=1, vocab_size=8, hidden_size=16).double(),
        byte_tokenizer(),
        name="small",
        fingerprint="",
    )
    text = target.tokenizer.decode([5])
    drafter = CausalLMDrafter(noisy(target.model, 0.3)).proposer(target)
    steps = SampledSteps(target, drafter, sampling=Sampling(1.0), delimiter=text, max_step_tokens=2, max_new_tokens=8)
    start = steps.start(Prompt("a", [1, 2, 3]))
    count = 600
    seen = Counter(one.tokens[3:] for one in (steps.next(start, number) for number in range(count)))
    with torch.no_grad():
        first_V = target.model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1)
        second_VV = torch.stack(
            [target.model(torch.tensor([[1, 2, 3, token]])).logits[0, -1].softmax(-1) for token in range(8)]
        )
    # A step ends with a token of the delimiter or with the end of the text; else it has two tokens.
    ends = {0, 5}
    wanted = {(token,): float(first_V[token]) for token in ends}
    wanted |= {(a, b): float(first_V[a] * second_VV[a, b]) for a in range(8) if a not in ends for b in range(8)}
    assert set(seen) <= set(wanted)
    likely = [step for step, chance in wanted.items() if chance * count >= 5]
    observed, expected = [seen[step] for step in likely], [wanted[step] * count for step in likely]
    rest = count - sum(expected)
    if rest > 1:
        observed, expected = [*observed, count - sum(observed)], [*expected, rest]
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    uniform = [count / len(observed)] * len(observed)
    assert stats.chisquare(observed, uniform).pvalue < 1e-6, "control: another distribution"


def test_what_cannot_be_searched_is_refused(target):
    with pytest.raises(DataError, match="no token of tiny contains the delimiter 'xyz'"):
        sampled(target, delimiter="xyz")
    entry = drafters.entry("kangaroo")
    kangaroo = entry.component.create(entry.settings(exit_layer=1), target=target, tokenizer=target.tokenizer)
    with pytest.raises(CheckpointError, match=r"search: .* reads the target while it reads the prompt"):
        sampled(target, kangaroo.proposer(target))


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_rewards_with_the_probability_of_its_label(labels, tmp_path: Path):
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, num_labels=labels, pad_token_id=0, initializer_range=0.5, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = ClassifierReward.load(str(tmp_path), device="cpu")
    found = reward("1 + 1 =", [" 2", " 3\n"])
    for text, one in zip((" 2", " 3\n"), found, strict=True):
        tokens = torch.tensor([byte_tokenizer()("1 + 1 =" + text)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        wanted = logits.sigmoid()[0] if labels == 1 else logits.exp()[1] / logits.exp().sum()
        assert one == pytest.approx(float(wanted), abs=1e-6)
    assert found[0] != found[1]
    assert reward.num_tokens == len("1 + 1 = 2") + len("1 + 1 = 3\n")


def test_a_classifier_of_more_labels_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=257, num_labels=3, **sizes))
    with pytest.raises(CheckpointError, match="mine: a reward has one label or two, this classifier has 3"):
        ClassifierReward(model, byte_tokenizer(), name="mine")


def test_the_frontier_counts_what_each_search_spent_on_sums_with_written_steps():
    target = drafttrain.load_target("builtin:adder")
    drafter = drafttrain.load_drafter("builtin:adder_drafter", target)
    prompts = read_prompts("builtin:addition_test", target.tokenizer, prompt_tokens=None, limit=2)
    answers = {target.tokenizer.decode(list(one.tokens)): one.answer for one in prompts}
    checker = Numeric(NumericSettings(spaced_digits=True))

    def reward(prompt: str, texts: Any) -> list[float]:
        return [float(checker.correct(text, answers[prompt], id="")) if "answer" in text else 0.5 for text in texts]

    steps = SampledSteps(
        target,
        drafter.proposer(target),
        sampling=Sampling(1.5),
        delimiter=".",
        max_step_tokens=24,
        max_new_tokens=64,
    )
    found = search_frontier(target, steps, prompts, reward, checker, [150, 400])
    assert [(one.method, one.budget) for one in found.points[:2]] == [("a_star", 150), ("a_star", 400)]
    assert found.exactness == "lossy"
    for one in found.points:
        assert one.num_tokens.value > 0
        assert one.method == "a_star" or one.budget <= one.num_tokens.value <= one.budget + 60
    assert {(one.method, one.baseline) for one in found.differences} == {
        ("a_star", "best_of_n"),
        ("a_star", "particle_filter"),
    }
    largest = [one.accuracy.value for one in found.points if one.budget == 400]
    assert max(largest) == 1, "the reward knows the answer"
    nothing = search_frontier(target, steps, [replace(one, answer="-1") for one in prompts], reward, checker, [150])
    assert all(one.accuracy.value == 0 for one in nothing.points), "control: another answer"


def test_a_search_is_the_same_alone_as_beside_others_and_goes_on_with_a_larger_budget(target):
    def found(methods: dict[str, Any], budgets: list[int]) -> dict[tuple[str, int], tuple[str, ...]]:
        texts: dict[tuple[str, int], tuple[str, ...]] = {}
        asked: list[str] = []

        def noted(method: Any, name: str) -> Any:
            def run(question: Question) -> Any:
                asked.clear()
                best = method(question)
                texts[name, question.budget] = (best.text, *asked)
                return best

            return run

        def reward(prompt: str, partials: Any) -> list[float]:
            asked.extend(partials)
            return [stream_seed(0, one) % 1000 / 1000 for one in partials]

        named = {name: noted(method, name) for name, method in methods.items()}
        prompt = replace(PROMPT, answer="1")
        search_frontier(target, sampled(target), [prompt], reward, Numeric(NumericSettings()), budgets, methods=named)
        return texts

    beside = found(dict(METHODS), [40, 80])
    for name, method in METHODS.items():
        alone = found({name: method}, [80])
        assert alone[name, 80] == beside[name, 80]
    first, second = beside["best_of_n", 40][1:], beside["best_of_n", 80][1:]
    assert second[: len(first) - 1] == first[:-1], "the last solution of the smaller budget may be a part"
    assert len(set(second)) == len(second) > 2, "control: the draws of one search differ"


def test_a_solution_ends_at_its_longest_length_also_within_a_step(target):
    steps = sampled(target, sampling=Sampling(0.0), max_step_tokens=7, max_new_tokens=9)
    partial = steps.start(PROMPT)
    while not partial.ended:
        partial = steps.next(partial, 1)
    assert list(partial.tokens[len(PROMPT.tokens) :]) == greedy(target, PROMPT, 9, stop=0)
