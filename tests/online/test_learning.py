"""Learning uses only the refused positions, from a buffer in which no user has too large a share."""

from __future__ import annotations

import copy

import pytest
import torch

from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.serving_logs.duplicates import Mark
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.buffer import HeldOut, ReplayBuffer
from drafttrain.online.learner import Learner
from drafttrain.online.plausible import surprise
from drafttrain.online.positions import refused_positions
from drafttrain.online.promotion import request_counts
from drafttrain.recorder.intake import Served
from drafttrain.training.settings import TrainSettings
from tests.conftest import random_llama

K = 3


def near_copy(target, *, noise: float, seed: int = 1) -> CausalLMDrafter:
    """Return a drafter that is refused sometimes: the target with noise on its weights."""
    torch.manual_seed(seed)
    model = copy.deepcopy(target.model).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return CausalLMDrafter(model)


def serve(target, drafter, *, temperature: float = 0.0, count: int = 6, tokens: int = 24):
    """Decode prompts with the engine and greedy drafts. Return their records and their rounds."""
    drafter.draft = "greedy"
    engine = Engine(
        target,
        drafter.proposer(target),
        rule=Lossless(),
        policy=FixedLength(FixedLengthSettings(num_draft_tokens=K)),
        sampling=Sampling(temperature),
        max_new_tokens=tokens,
        seed=3,
    )
    prompts = [Prompt(f"p{i}", [5 + i, 40 + 3 * i, 90 + i]) for i in range(count)]
    found = [engine.generate([prompt])[0] for prompt in prompts]
    records = [
        Record(one.id, [*one.prompt_tokens, *one.tokens], [False] * 3 + [True] * len(one.tokens)) for one in found
    ]
    return records, [one.rounds for one in found]


def refused_by_the_engine(rounds) -> list[int]:
    return [
        r.start + r.num_accepted
        for r in rounds
        if r.num_accepted < r.num_draft_tokens and r.num_emitted > r.num_accepted
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_refusals_equal_those_of_the_engine(tiny_target, temperature):
    drafter = near_copy(tiny_target, noise=0.4)
    records, rounds = serve(tiny_target, drafter, temperature=temperature)
    expected = [[3 + place for place in refused_by_the_engine(r)] for r in rounds]
    assert refused_positions(tiny_target, drafter, records, Sampling(), num_draft_tokens=K, seed=0) == expected
    assert any(expected), "no token was refused, so the test proves nothing"
    # The token after a round with all draft tokens accepted is not a refusal, so the last tokens of all rounds are different.
    all_rounds = [[3 + r.start + r.num_accepted for r in rs] for rs in rounds]
    assert all_rounds != expected


def test_the_gradient_is_zero_where_nothing_was_refused(tiny_target):
    drafter = near_copy(tiny_target, noise=0.4)
    records, _ = serve(tiny_target, drafter)
    found = refused_positions(tiny_target, drafter, records, Sampling(), num_draft_tokens=K, seed=0)
    marked = [Record(r.id, r.tokens, r.loss_mask, refused=places) for r, places in zip(records, found, strict=True)]
    settings = TrainSettings(optimizer="sgd", lr=0.1, batch_size=4)
    seen: list[torch.Tensor] = []

    class Watched(CausalLMDrafter):
        def forward(self, batch):
            drafted = super().forward(batch)
            drafted.states_BTD[1].register_hook(seen.append)
            return drafted

    learner = Learner(
        Watched(drafter.model), ForwardKL(), target=tiny_target, settings=settings, max_length=32, num_tokens=257
    )
    record = next(r for r in marked if r.refused)
    step = learner.step([record], positions="refused")
    assert step.positions == len(record.refused)
    rows = seen[0][0].abs().sum(-1).nonzero()[:, 0].tolist()
    # The wrong prediction is in the row before the token that corrects it.
    assert rows == [place - 1 for place in record.refused]
    learner.step([record], positions="all")
    assert len(seen[1][0].abs().sum(-1).nonzero()) == sum(record.loss_mask) > len(rows)


def request(number: int, *, user: str = "", domain: str = "") -> Served:
    record = Record(f"r{number}", [1, 2, 3 + number % 200], [False, True, True], domain=domain)
    return Served(record, user, Mark(str(number), ""))


def names(requests) -> list[str]:
    return [one.record.id for one in requests]


def test_a_restored_buffer_continues_as_before_and_no_user_exceeds_the_quota():
    def filled(stop: int) -> ReplayBuffer:
        buffer = ReplayBuffer(40, recent=0.5, user_quota=0.1, seed=1)
        for number in range(stop):
            buffer.add(request(number, user="loud" if number % 2 else f"user{number}"))
        return buffer

    whole, half = filled(300), filled(150)
    again = ReplayBuffer(40, recent=0.5, user_quota=0.1, seed=1)
    again.restore(half.state())
    for number in range(150, 300):
        again.add(request(number, user="loud" if number % 2 else f"user{number}"))
    assert names(again.recent) == names(whole.recent)
    assert names(again.reservoir) == names(whole.reservoir)
    assert names(again.draw(8, step=4, recent=0.5)) == names(whole.draw(8, step=4, recent=0.5))
    for part in (whole.recent, whole.reservoir):
        assert sum(one.user == "loud" for one in part) <= 2
    # Some old requests are still in the reservoir.
    assert min(int(name[1:]) for name in names(whole.reservoir)) < 150
    held_out = HeldOut(20, user_quota=0.1)
    for number in range(100):
        held_out.add(request(number, user="loud" if number > 10 else ""))
    assert sum(one.user == "loud" for one in held_out.requests) == 2


def test_users_without_requests_in_the_reservoir_are_forgotten():
    buffer = ReplayBuffer(20, recent=0.5, user_quota=0.1, seed=1)
    for number in range(500):
        buffer.add(request(number, user=f"user{number}"))
    assert len(buffer.state()["offered_by"]) <= 10


def test_equal_answers_are_held_out_only_once():
    held_out = HeldOut(20, user_quota=1.0)
    for number in range(15):
        held_out.add(request(number))
        stuck = request(7)
        stuck.record.tokens[0] = 100 + number
        held_out.add(stuck)
    # The newest one is kept.
    assert [one.record.tokens[0] for one in held_out.requests if one.record.tokens[1:] == [2, 10]] == [114]
    assert len(held_out.requests) == 15


def test_the_reservoir_is_a_uniform_sample():
    counts = torch.zeros(60)
    for seed in range(400):
        buffer = ReplayBuffer(12, recent=0.17, user_quota=1.0, seed=seed)
        for number in range(60):
            buffer.add(request(number))
        for name in names(buffer.reservoir):
            counts[int(name[1:])] += 1
    old = counts[:50]
    # 10 of 58 offered, 400 times: 69 each on average, standard deviation 7.6.
    assert abs(float(old.mean()) - 69) < 4
    assert float((old - 69).abs().max()) < 5 * 7.6


def test_answers_that_the_target_did_not_write_are_detected(tiny_target):
    drafter = near_copy(tiny_target, noise=0.1)
    own = [*serve(tiny_target, drafter, temperature=1.0)[0], *serve(tiny_target, drafter)[0]]
    assert max(surprise(tiny_target, own)) < 3
    torch.manual_seed(0)
    forged = [
        Record(r.id, [*r.tokens[:3], *torch.randint(1, 257, (len(r.tokens) - 3,)).tolist()], r.loss_mask)
        for r in own
        if len(r.tokens) > 20
    ]
    # A few tokens of a flat distribution carry little evidence, so the texts must be long.
    assert len(forged) > 4
    assert min(surprise(tiny_target, forged)) > 3


@pytest.mark.long
def test_learning_at_refused_positions_raises_block_efficiency(tiny_target):
    drafter = CausalLMDrafter(random_llama(seed=0).requires_grad_(True))
    with torch.no_grad():
        for name, parameter in drafter.model.named_parameters():
            if "mlp" in name:
                parameter.mul_(0.5)
    records, _ = serve(tiny_target, drafter, count=12)
    found = refused_positions(tiny_target, drafter, records, Sampling(), num_draft_tokens=K, seed=0)
    marked = [Record(r.id, r.tokens, r.loss_mask, refused=places) for r, places in zip(records, found, strict=True)]

    def efficiency() -> float:
        counts = request_counts(tiny_target, drafter, records, Sampling(), num_draft_tokens=K)
        return sum(a for a, _ in counts) / sum(b for _, b in counts)

    before = efficiency()
    learner = Learner(
        drafter,
        ForwardKL(),
        target=tiny_target,
        settings=TrainSettings(lr=2e-3, batch_size=12, warmup_steps=0),
        max_length=32,
        num_tokens=257,
    )
    for _ in range(25):
        learner.step(marked, positions="refused")
    assert efficiency() > before + 0.2
