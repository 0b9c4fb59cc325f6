"""DEL: the choice has the most tokens per cost, what it rests on is what every exit would have drafted, and the output stays the target's.

L = blocks, V = vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from drafttrain.core.device_time import Span
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent, ForwardShape, Generation, Work
from drafttrain.core.roles import CostAware
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.arms import Arm
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers import Surroundings, TrainingFree, is_warm, make
from drafttrain.eval.proposers.dynamic_exit import DelSettings, DynamicExit, exits_of
from drafttrain.eval.proposers.exit_choice import FIRST_BLOCKS, SHADOWS, ExitCosts, ExitRecord, best_draft
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from tests.conftest import random_llama
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy
from tests.eval.test_early_exit_engine import idle_from, wrapped

NUM_BLOCKS = 5


def del_of(target: Target, listener: Any = None, **settings: Any) -> DynamicExit:
    chosen = DelSettings(**{"costs": "blocks", "every_rounds": 1} | settings)
    made = make(chosen, Surroundings(target, listener=listener))
    assert isinstance(made, DynamicExit)
    return made


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=NUM_BLOCKS).double())


# ---------------------------------------------------------------- the choice


def test_the_choice_is_that_of_all_pairs_in_closed_form():
    """Tokens per layer, and seconds. Controls: without the target's own pass, and without the root's token."""
    draw = random.Random(0)
    other = 0
    for _ in range(200):
        exits = sorted(draw.sample(range(1, 30), 6))
        acceptance = {one: draw.choice([0.0, draw.random(), 0.5 + draw.random() / 2]) for one in exits}
        costs = ExitCosts.in_blocks(exits, 30)
        if draw.random() < 0.5:
            costs = ExitCosts({one: draw.random() for one in exits}, {one: draw.uniform(0.5, 4) for one in exits})

        def rate(
            exit_layer: int, count: int, *, root: int = 1, costs: ExitCosts = costs, of: Any = acceptance
        ) -> float:
            chance = of[exit_layer]
            return (1 - chance ** (count + root)) / (1 - chance) / costs(exit_layer, count)

        pairs = list(product(exits, range(13)))
        chosen = best_draft(acceptance, costs, most=12)
        assert rate(*chosen) == pytest.approx(max(rate(*pair) for pair in pairs), rel=1e-12)
        other += chosen != max(pairs, key=lambda pair: rate(*pair, root=0))
    assert other > 20
    assert ExitCosts.in_blocks([3], 30)(3, 4) == 4 * 3 + 30
    assert best_draft({4: 1.0, 8: 1.0}, ExitCosts.in_blocks([4, 8], 30), most=5) == (4, 5)
    assert best_draft({4: 0.0, 8: 0.0}, ExitCosts.in_blocks([4, 8], 30), most=5)[1] == 0


def test_the_record_converges_to_the_chance_and_follows_a_change():
    """Control: without decay it does not follow."""
    draw = random.Random(1)
    found = {}
    for decay in (0.99, 1.0):
        record = ExitRecord(decay)
        assert not record.known
        assert record.threshold == 0
        for chance in (0.7, 0.2):
            for _ in range(800):
                accepted = [float(draw.random() < chance) for _ in range(3)]
                record.add(accepted, [0.8 if one else 0.3 for one in accepted])
            found[decay, chance] = record.acceptance
    assert found[0.99, 0.7] == pytest.approx(0.7, abs=0.08)
    assert found[0.99, 0.2] == pytest.approx(0.2, abs=0.08)
    assert found[1.0, 0.7] == pytest.approx(0.7, abs=0.03)
    assert found[1.0, 0.2] == pytest.approx(0.45, abs=0.03)
    assert record.threshold == pytest.approx((0.8 + 0.3) / 2)
    surer_when_wrong = ExitRecord(0.9)
    surer_when_wrong.add([1.0, 0.0], [0.2, 0.9])
    assert surer_when_wrong.threshold == 0


def call(name: str, num_layers: int, seconds: float, *, prefill: bool = False) -> ForwardEvent:
    shape = ForwardShape(1, context=4, pairs=5, num_sequences=1, num_layers=num_layers, head_rows=0)
    return ForwardEvent(name, shape, Work(), Span.of(seconds), prefill=prefill)


def test_measured_costs_are_lines_over_the_blocks_with_the_time_beside_the_calls():
    """A call takes 2 + 3 l; a head 5; the host 7 for each call of the first blocks, and 11 for each round. Control: of one exit."""
    events, rounds, calls = [call("target", 30, 999.0, prefill=True)], 0, 0
    for exit_layer, tokens in ((4, 3), (8, 3), (4, 2)):
        for _ in range(tokens + 1):
            events.append(call(FIRST_BLOCKS, exit_layer, 2 + 3 * exit_layer))
        events += [call("drafter", 0, 5.0) for _ in range(tokens + 1)]
        events.append(call("target", 30 - exit_layer, 100 + 2 * (30 - exit_layer)))
        rounds, calls = rounds + 1, calls + tokens + 1
    first = sum(event.seconds for event in events if event.model == FIRST_BLOCKS)
    rest = sum(event.seconds for event in events if event.model == "target" and not event.prefill)
    one = Generation("", "", [], [], [], 0.0, first + (5 + 7) * calls, rest + 11 * rounds, 0.0)
    costs = ExitCosts.measured([4, 8, 20], 30, [one], events)
    assert costs is not None
    for exit_layer in (4, 8, 20):
        token = 2 + 3 * exit_layer + 5 + 7
        assert costs.of_token[exit_layer] == pytest.approx(token)
        assert costs.of_round[exit_layer] == pytest.approx(token + 100 + 2 * (30 - exit_layer) + 11)
    assert ExitCosts.measured([4, 8], 30, [one], events[:5]) is None


# ---------------------------------------------------------------- in the loop


def test_greedy_output_is_the_targets_own_whichever_exits_draft(target):
    wanted = [greedy(target, prompt, 16) for prompt in PROMPTS]
    for settings in ({}, {"every_rounds": 2, "stops": False}, {"costs": "measured"}):
        proposer, used = del_of(target, **settings), set()
        choice = proposer.choice

        def noted(most: int, choice: Any = choice, used: set[int] = used) -> tuple[int, int]:
            found: tuple[int, int] = choice(most)
            used.add(found[0])
            return found

        proposer.choice = noted  # type: ignore[method-assign]
        assert [one.tokens for one in decode(target, proposer, new=16, stop_tokens=())] == wanted
        assert len(used) > 1, settings
        (alone,) = decode(target, proposer, prompts=PROMPTS[:1], new=16, stop_tokens=())
        assert alone.tokens == wanted[0]


def test_sampled_output_has_the_targets_distribution():
    target = wrapped(random_llama(num_layers=4, vocab_size=8, hidden_size=16).double())
    proposer = del_of(target, every_rounds=2)
    assert chi_square(target.model, proposer, 1.0, samples=500, target=target) > 1e-3


def test_control_a_choice_that_sees_the_drawn_token_changes_the_distribution():
    """It drops the last token by its value."""
    from dataclasses import replace

    target = wrapped(random_llama(num_layers=4, vocab_size=8, hidden_size=16).double())
    proposer = del_of(target, stops=False)
    propose = proposer.propose

    def shortened(*arguments: Any) -> Any:
        return [cut(one) if int(one.tokens_N[-1]) % 2 and len(one.tokens_N) > 1 else one for one in propose(*arguments)]

    def cut(one: Any) -> Any:
        end = 1
        row_N = None if one.q_row_N is None else torch.full((end,), -1)
        names = ("tokens_N", "parents_N", "depths_N", "kinds_N")
        resume = replace(one.resume, hidden_ND=one.resume.hidden_ND[:end])
        return replace(one, q_row_N=row_N, resume=resume, **{name: getattr(one, name)[:end] for name in names})

    proposer.propose = shortened  # type: ignore[method-assign]
    policy = FixedLength(FixedLengthSettings(1))
    assert chi_square(target.model, proposer, 1.0, samples=500, target=target, policy=policy) < 1e-3


@torch.no_grad()
def rates_of(target: Target, found: Sequence[Generation], exits: Sequence[int], temperature: float) -> list[float]:
    """Return how often a token drafted by each exit would be accepted at the new tokens of texts, from one plain forward of each."""
    overlaps: list[torch.Tensor] = []
    for one in found:
        text = torch.tensor([[*one.prompt_tokens, *one.tokens]])
        output = target.model(text, output_hidden_states=True)
        states = [final_norm(target.model)(output.hidden_states[number]) for number in exits]
        logits = [output.logits, *(target.model.get_output_embeddings()(state) for state in states)]
        begin = len(one.prompt_tokens) - 1
        p, *drafted = (each[0, begin:-1] for each in logits)
        if temperature == 0:
            rows = [(q.argmax(-1) == p.argmax(-1)).double() for q in drafted]
        else:
            rows = [torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1) for q in drafted]
        overlaps.append(torch.stack(rows))
    return [float(value) for value in torch.cat(overlaps, dim=1).mean(dim=1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_record_is_what_each_exit_would_have_drafted(target, temperature):
    """Over all rounds, against plain forwards. Control: the states one block earlier."""
    proposer = del_of(target, decay=1.0, warm=True, exits=[1, 2, 3, 4])
    found = decode(target, proposer, temperature=temperature, new=12, stop_tokens=())
    recorded = [record.acceptance for record in proposer.records.values()]
    assert recorded == pytest.approx(rates_of(target, found, proposer.exits, temperature), abs=1e-9)
    earlier = rates_of(target, found, [0, 1, 2, 3], temperature)
    assert max(abs(one - other) for one, other in zip(recorded, earlier, strict=True)) > 0.01


def test_it_finds_the_exit_after_which_blocks_do_nothing():
    """Control: it does not where it never looks again."""
    target = wrapped(idle_from(random_llama(num_layers=NUM_BLOCKS).double(), 2))
    prompt = [Prompt("one", [1, 2, 3])]
    for every_rounds, finds in ((1, True), (1000, False)):
        proposer = del_of(target, exits=[1, 2, 4], every_rounds=every_rounds)
        if not finds:
            proposer._num_rounds = 1001
            proposer.forget = lambda: None  # type: ignore[method-assign]
        ledger = Ledger()
        (one,) = decode(target, proposer, prompts=prompt, new=40, stop_tokens=(), listener=ledger.append)
        assert one.tokens == greedy(target, prompt[0], 40)
        last = [event.shape.num_layers for event in ledger.rounds(FIRST_BLOCKS)][-1]
        assert proposer.choice(5) == (2, 5 if finds else 1)
        assert last == 2
        if finds:
            assert proposer.records[2].acceptance == 1
            assert proposer.records[1].acceptance < 1
            assert all(part.num_accepted == part.num_draft_tokens for part in one.rounds[2:-1])
        else:
            assert not proposer.records[2].known


def test_observing_is_in_the_ledger_in_the_first_rounds_and_every_kth(target):
    for every_rounds in (1, 3):
        ledger = Ledger()
        proposer = del_of(target, ledger.append, every_rounds=every_rounds)
        (one,) = decode(target, proposer, prompts=PROMPTS[:1], new=16, stop_tokens=(), listener=ledger.append)
        shadows = ledger.rounds(SHADOWS)
        observed = [*one.rounds[:every_rounds], *one.rounds[every_rounds::every_rounds]]
        assert [event.shape.head_rows for event in shadows] == [
            len(proposer.exits) * (part.num_accepted + 1) for part in observed
        ]
        head = target.model.get_output_embeddings().weight.numel() * 8
        assert all(event.work.weight_bytes > head for event in shadows)


def test_every_prompt_starts_again_unless_it_is_warm(target):
    def rounds(proposer: DynamicExit, number: int) -> list[int]:
        prompt = Prompt(str(number), [1 + number, 2, 3])
        (found,) = decode(target, proposer, prompts=[prompt], new=12, stop_tokens=())
        return [one.num_draft_tokens for one in found.rounds]

    cold, warm = del_of(target), del_of(target, warm=True)
    assert (is_warm(cold.settings), is_warm(warm.settings)) == (False, True)
    alone = [rounds(del_of(target), number) for number in range(2)]
    assert [rounds(cold, number) for number in range(2)] == alone
    assert rounds(warm, 0) == alone[0]
    assert all(record.known for record in warm.records.values())
    warm.forget()
    assert rounds(warm, 0) == alone[0]


def test_an_arm_measures_the_costs_of_several_exits_first(target):
    settings = EvalSettings(max_new_tokens=12, temperatures=[0.0])
    source = TrainingFree(DelSettings(every_rounds=1))
    arm = Arm.create("del", source, target, Sampling(), settings, length=FixedLengthSettings(), stop_tokens=())
    proposer: Any = arm.engine.proposer
    assert isinstance(proposer, CostAware)
    assert proposer._costs is None
    arm.warm_up(PROMPTS[:2])
    assert proposer._costs is not None
    assert set(proposer._costs.of_round) == set(proposer.exits)
    assert all(value > 0 for value in proposer._costs.of_round.values())
    assert not any(record.known for record in proposer.records.values())
    assert not arm.ledger.events


def test_exits_are_spread_or_refused(target):
    assert exits_of(30, []) == [4, 8, 12, 17, 21, 25]
    assert exits_of(5, []) == [1, 2, 3, 4]
    assert exits_of(2, []) == [1]
    assert exits_of(9, [5, 2, 5]) == [2, 5]
    with pytest.raises(CheckpointError, match=r"exits must be 1\.\.4 for this target \(5 blocks\), got \[5, 9\]"):
        del_of(target, exits=[1, 5, 9])
    with pytest.raises(CheckpointError, match="a target of one block"):
        exits_of(1, [])
