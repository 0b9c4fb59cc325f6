"""Length policies with an acceptance head: edge cases, output distribution, cost, and a chain whose optimum is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import Generation, Round
from drafttrain.core.probability import draw, sampling_probs
from drafttrain.core.proposals import DraftStep, More, Verdict, fixed_chain
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.cumulative_reject import CumulativeReject, CumulativeRejectSettings
from drafttrain.eval.length.expected_cost import ExpectedCost, ExpectedCostSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.heads.acceptance import AcceptanceHead, AcceptanceSettings
from tests.drafters.eagle_models import eagle_drafter, eagle_target
from tests.eval.decoding import PROMPTS, V, chi_square, decode, greedy, noisy, small_target
from tests.eval.test_engine import target as target
from tests.marks import slow


def write_head(folder: Path, hidden_size: int, *, gain: float = 8.0) -> str:
    """Write a random head whose predictions are spread over 0..1."""
    torch.manual_seed(0)
    head = AcceptanceHead(AcceptanceSettings(num_blocks=1), hidden_size)
    with torch.no_grad():
        head.output.weight.mul_(gain)
    head.save(folder)
    return str(folder)


def known_head(folder: Path) -> str:
    """Write a head whose prediction is exact: its one feature is the logit of the acceptance."""
    head = AcceptanceHead(AcceptanceSettings(num_blocks=0, prior_correct=False), 1)
    with torch.no_grad():
        head.output.weight.fill_(1.0)
        head.output.bias.zero_()
    head.save(folder)
    return str(folder)


def cumulative(head: str, threshold: float, **settings: Any) -> CumulativeReject:
    return CumulativeReject(CumulativeRejectSettings(threshold=threshold, head=head, **settings))


@pytest.mark.parametrize(("threshold", "drafted"), [(1.0, 6), slow(2.0, 6), (-0.01, 2), slow(-1.0, 2)])
def test_a_threshold_of_1_drafts_to_the_maximum_and_one_below_0_to_the_minimum(target, tmp_path, threshold, drafted):
    head = write_head(tmp_path, 32)
    proposer = ChainProposer(noisy(target.model, 0.02), target_vocab_size=V)
    policy = cumulative(head, threshold, min_tokens=2, max_tokens=6)
    for temperature in (0.0, 1.0):
        for one in decode(target, proposer, temperature=temperature, policy=policy, new=40, stop_tokens=()):
            assert {part.num_draft_tokens for part in one.rounds if part.start < 33} == {drafted}


@pytest.mark.parametrize("name", ["cumulative", "cost"])
def test_greedy_output_is_the_targets_own_and_no_forward_is_wasted(target, tmp_path, name):
    head = write_head(tmp_path, 32)
    settings = ExpectedCostSettings(draft_cost=1, target_cost=4, head=head)
    policy = cumulative(head, 0.5) if name == "cumulative" else ExpectedCost(settings)
    ledger = Ledger()
    proposer = ChainProposer(noisy(target.model, 0.02), target_vocab_size=V, listener=ledger.append)
    for prompt in PROMPTS:
        (found,) = decode(target, proposer, prompts=[prompt], policy=policy)
        assert found.tokens == greedy(target, prompt, 40)
        drafted = [part.num_draft_tokens for part in found.rounds]
        assert len(set(drafted)) > 1, "the policy decides something"
        assert ledger.calls("drafter") == sum(drafted)
        ledger.events.clear()


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("cumulative", "kangaroo", {"exit_layer": 2}),
        slow("cumulative", "eagle", {}),
        ("cumulative", "eagle3", {"draft_vocab_size": 120}),
        slow("cost", "kangaroo", {"exit_layer": 2}),
        ("cost", "eagle", {}),
        slow("cost", "eagle3", {"draft_vocab_size": 120}),
    ],
)
def test_drafters_on_the_targets_features_stop_by_a_head_too(kind, settings, name, tmp_path):
    """Alone and in a batch, greedy and sampled: the same text; lengths differ from round to round."""
    target = eagle_target()
    drafter = eagle_drafter(kind, target, **settings)
    head = write_head(tmp_path, 32)

    def found(prompts: Any, temperature: float) -> list[Any]:
        weighed = ExpectedCostSettings(draft_cost=1, target_cost=4, max_tokens=5, head=head)
        policy = cumulative(head, 0.5, max_tokens=5) if name == "cumulative" else ExpectedCost(weighed)
        proposer = drafter.proposer(target)
        return decode(target, proposer, prompts=prompts, temperature=temperature, policy=policy, new=24, stop_tokens=())

    for prompt, one in zip(PROMPTS, found(PROMPTS, 0.0), strict=True):
        assert one.tokens == greedy(target, prompt, 24)
    drafted = {part.num_draft_tokens for one in found(PROMPTS, 1.0) for part in one.rounds if part.start < 18}
    assert len(drafted) > 1, "the policy decides something"
    if name == "cumulative":  # the other one learns from all sequences
        alone = [found([prompt], 1.0)[0] for prompt in PROMPTS]
        assert [(one.tokens, one.rounds) for one in alone] == [(o.tokens, o.rounds) for o in found(PROMPTS, 1.0)]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    model = small_target().model
    return model, noisy(model, 0.15)


@pytest.mark.long
def test_the_output_has_the_targets_distribution_whatever_the_head_predicts(small, tmp_path):
    model, drafter = small
    head = write_head(tmp_path, 16)
    policies = (
        cumulative(head, 0.5, max_tokens=3),
        ExpectedCost(ExpectedCostSettings(draft_cost=1, target_cost=3, max_tokens=3, head=head)),
    )
    for policy in policies:
        lengths: set[int] = set()

        def change(engine: Any, policy: Any = policy, lengths: set[int] = lengths) -> None:
            observe = policy.observe
            policy.observe = lambda verdict: (lengths.add(verdict.num_draft_tokens), observe(verdict))
            engine.policy = policy

        proposer = ChainProposer(drafter, target_vocab_size=8)
        assert chi_square(model, proposer, 1.0, prepare=change, samples=1200) > 1e-3
        assert len(lengths) > 1


@pytest.mark.long
def test_control_a_stop_that_reads_a_token_and_drops_it_changes_the_distribution(small):
    """Breaks the filtration rule: the next token is read before it is in the tree, and dropped if it is odd."""
    model, drafter = small
    proposer = ChainProposer(drafter, target_vocab_size=8)

    class Peeking(FixedLength):
        generators: Any = ()

        def more(self, step: DraftStep) -> bool:
            copy = torch.Generator()
            copy.set_state(self.generators[step.sequence].get_state())
            return draw(sampling_probs(step.logits_V, engine_sampling[0]), copy) % 2 == 0

    policy = Peeking(FixedLengthSettings(2))
    engine_sampling: list[Any] = []

    def change(engine: Any) -> None:
        engine.policy = policy
        engine_sampling[:] = [engine.sampling]
        propose = proposer.propose

        def watched(budgets: Any, sampling: Any, generators: Any, more: Any) -> Any:
            policy.generators = generators
            return propose(budgets, sampling, generators, more)

        proposer.propose = watched  # type: ignore[method-assign]

    assert chi_square(model, proposer, 1.0, prepare=change, samples=1200) < 1e-3


# ---------------------------------------------------------------- a chain whose chances are known

PATTERN = [0.97] * 6 + [0.25] * 3
DRAFT_COST, TARGET_COST, LENGTH, MAX_TOKENS = 1.0, 5.0, 180, 12


def chance(place: int) -> float:
    return PATTERN[place % len(PATTERN)]


def drafted_by(policy: Any, place: int) -> int:
    """Return the number of tokens that a policy drafts from a position of the chain."""
    for depth in range(1, MAX_TOKENS + 1):
        newest = chance(place + depth - 2)  # of the draft token that was read last
        hidden_D = torch.tensor([math.log(newest / (1 - newest))])
        answer = policy.more(DraftStep(0, depth, torch.zeros(2), hidden_D, 0))
        if answer is More.LAST:
            return depth
        if not answer:
            return depth - 1
    return MAX_TOKENS


def expected_cost(lengths: Any) -> float:
    """Return the exact expected cost of the chain where lengths[t] tokens are drafted at t, or the best number."""
    costs = np.zeros(LENGTH + MAX_TOKENS + 2)
    for place in reversed(range(LENGTH)):
        options = range(MAX_TOKENS + 1) if lengths is None else [lengths[place]]
        costs[place] = min(_round_cost(place, k, costs) for k in options)
    return float(costs[0])


def _round_cost(place: int, num_draft_tokens: int, costs: Any) -> float:
    total, alive = DRAFT_COST * num_draft_tokens + TARGET_COST, 1.0
    for i in range(num_draft_tokens):
        total += alive * (1 - chance(place + i)) * costs[place + i + 1]
        alive *= chance(place + i)
    return total + alive * costs[place + num_draft_tokens + 1]


def best_fixed() -> float:
    return min(expected_cost([k] * LENGTH) for k in range(MAX_TOKENS + 1))


def test_a_threshold_costs_less_than_any_fixed_length_and_no_less_than_the_oracle(tmp_path):
    head = known_head(tmp_path)
    oracle, fixed = expected_cost(None), best_fixed()
    by_threshold = {}
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        policy = cumulative(head, threshold, max_tokens=MAX_TOKENS)
        by_threshold[threshold] = expected_cost([drafted_by(policy, place) for place in range(LENGTH)])
    best = min(by_threshold.values())
    assert oracle < best < 0.97 * fixed
    assert best < 1.12 * oracle
    # Control: with an uninformed head the same rule is a fixed length.
    blind = CumulativeReject(CumulativeRejectSettings(threshold=0.5, max_tokens=MAX_TOKENS))
    blind.survival = type("Blind", (), {"after": lambda self, step: 0.8 ** (step.depth - 1)})()
    assert len({drafted_by(blind, place) for place in range(LENGTH)}) == 1


def test_expected_cost_yields_more_per_second_than_any_fixed_length(tmp_path):
    """The policy learns its rate from sampled rounds."""
    policy = ExpectedCost(
        ExpectedCostSettings(
            draft_cost=DRAFT_COST, target_cost=TARGET_COST, max_tokens=MAX_TOKENS, head=known_head(tmp_path)
        )
    )
    rng = np.random.default_rng(0)
    place, cost = 0, 0.0
    while place < 30 * LENGTH:
        count = drafted_by(policy, place)
        kept = next((i for i in range(count) if rng.random() >= chance(place + i)), count)
        policy.observe(Verdict(range(kept + 1), [0] * (kept + 1), "reject", fixed_chain(0, [0] * count)))
        cost += DRAFT_COST * count + TARGET_COST
        place += kept + 1
    assert cost / place < 0.97 * best_fixed() / LENGTH
    assert policy.rate == pytest.approx(place / cost)


def test_at_a_given_rate_expected_cost_is_a_threshold(tmp_path):
    """It stops where alive * a^2 / t_draft < rate: a cumulative threshold of 1 - rate t_draft / a^2."""
    head = known_head(tmp_path)
    policy = ExpectedCost(ExpectedCostSettings(draft_cost=1.0, target_cost=4.0, max_tokens=MAX_TOKENS, head=head))
    policy._accepted.add(0.8 * 1e9 - 1, 1e9 - 1)  # 0.8 in all
    threshold = 1 - 0.25 / 0.8**2
    other = cumulative(head, threshold, max_tokens=MAX_TOKENS)
    lengths = [drafted_by(policy, place) for place in range(len(PATTERN))]
    assert lengths == [drafted_by(other, place) for place in range(len(PATTERN))]
    assert len(set(lengths)) > 1


def test_the_cost_of_a_draft_is_a_round_without_the_verifying_call(tmp_path):
    policy = ExpectedCost(ExpectedCostSettings(head=known_head(tmp_path), max_tokens=4))
    assert drafted_by(policy, 6) == MAX_TOKENS, "not measured: it drafts as far as it is let"

    def output(drafted: list[int], *, draft_seconds: float, verify_seconds: float) -> Generation:
        rounds = [Round(0, count, count, 0, 1, "reject") for count in drafted]
        return Generation("a", "", [1], [2], rounds, 9.0, draft_seconds, verify_seconds, 99.0)

    policy.calibrate([output([0], draft_seconds=1.0, verify_seconds=7.0)])
    assert (policy.draft_cost, policy.target_cost) == (None, None), "nothing was drafted: nothing is known"
    outputs = [
        output([4, 2], draft_seconds=9.0, verify_seconds=10.0),
        output([0, 3], draft_seconds=9.0, verify_seconds=14.0),
    ]
    policy.calibrate(outputs)
    assert (policy.draft_cost, policy.target_cost) == (2.0, 6.0)
    assert drafted_by(policy, 6) < 4
    given = ExpectedCost(ExpectedCostSettings(draft_cost=1, target_cost=4, head=known_head(tmp_path)))
    given.calibrate(outputs)
    assert (given.draft_cost, given.target_cost) == (1, 4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kangaroo", {"exit_layer": 2}), ("eagle", {}), ("eagle3", {"draft_vocab_size": 120}), ("medusa", {})],
)
def test_the_measured_cost_includes_every_forward_of_the_draft(kind, settings):
    """Kangaroo also drafts with the target's first blocks: its adapter is only a part of the cost."""
    target, ledger = eagle_target(), Ledger()
    proposer = eagle_drafter(kind, target, **settings).proposer(target, ledger.append)
    engine = Engine(
        target,
        proposer,
        rule=Lossless(),
        policy=FixedLength(FixedLengthSettings(3)),
        sampling=Sampling(),
        max_new_tokens=16,
        listener=ledger.append,
    )
    outputs = engine.generate(PROMPTS[:1])
    policy = ExpectedCost(ExpectedCostSettings(head="unread"))
    policy.calibrate(outputs)
    rounds = outputs[0].rounds
    assert policy.draft_cost is not None
    assert policy.target_cost is not None
    seconds = {name: sum(one.seconds for one in ledger.rounds(name)) for name in {e.model for e in ledger.events}}
    assert ("target's first blocks" in seconds) == (kind == "kangaroo")
    drafting = sum(part for name, part in seconds.items() if name != "target")
    assert policy.draft_cost * sum(one.num_draft_tokens for one in rounds) >= drafting > 0
    assert policy.target_cost * len(rounds) >= seconds["target"]


def test_a_head_of_another_width_is_refused(target, tmp_path):
    policy = cumulative(write_head(tmp_path, 16), 0.5)
    with pytest.raises(CheckpointError, match="made for a drafter of width 16, this drafter has 32"):
        decode(target, ChainProposer(noisy(target.model, 0.02), target_vocab_size=V), policy=policy)
