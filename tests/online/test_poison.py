"""With forged answers in the stream, a promoted drafter is not worse on clean requests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.serving_logs.duplicates import Mark
from drafttrain.drafters import Drafter
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.interval import Interval
from drafttrain.eval.statistics import ratio_difference
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.buffer import ReplayBuffer
from drafttrain.online.learner import Learner
from drafttrain.online.promotion import request_counts
from drafttrain.online.route import OnlineSetup
from drafttrain.recorder.intake import Served
from drafttrain.target_model import Target
from tests.online.test_learning import K
from tests.online.test_loop import online_run, prompts, serve, start

STREAM, NONSENSE, TESTED = 84, 36, 48
"""Requests: clean ones in the stream, forged ones in the stream (30 %), and clean ones for the test."""


def read_log(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def forged(line: dict, ids: Sequence[int]) -> dict:
    """Return a log line with another answer."""
    choice = line["response"]["choices"][0] | {"token_ids": list(ids)}
    return line | {"response": line["response"] | {"choices": [choice]}}


def nonsense(lines: Sequence[dict], draws: random.Random) -> list[dict]:
    """Return the lines with wrong answers: random tokens, one repeated token, shuffled tokens, or the same answer for all."""
    answers = [line["response"]["choices"][0]["token_ids"] for line in lines]
    found = []
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        kinds = (
            [draws.randrange(1, 257) for _ in answer],
            [draws.choice(answer)] * len(answer),
            draws.sample(answer, len(answer)),
            answers[0],
        )
        found.append(forged(line, kinds[number % len(kinds)]))
    return found


def record_of(line: dict) -> Record:
    prompt, answer = line["request"]["prompt"], line["response"]["choices"][0]["token_ids"]
    return Record(line["id"], [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def gain(target: Target, drafter: Drafter, first: Path, records: Sequence[Record]) -> Interval:
    """Return the gain of block efficiency over the first drafter on clean requests, paired."""
    counts = [
        request_counts(target, one, records, Sampling(), num_draft_tokens=K)
        for one in (drafter, read_drafter(first, target))
    ]
    return ratio_difference(*(tuple(zip(*one, strict=True)) for one in counts))


def unguarded(setup: OnlineSetup, first: Path, records: Sequence[Record]) -> CausalLMDrafter:
    """Train on all requests with the same number of steps as a run, without filter and without promotion test."""
    drafter = read_drafter(first, setup.target)
    assert isinstance(drafter, CausalLMDrafter)
    learner = Learner(
        drafter,
        setup.loss(),
        target=setup.target,
        settings=setup.train,
        max_length=setup.max_length,
        num_tokens=setup.target.num_tokens,
    )
    online = setup.online
    buffer = ReplayBuffer(online.buffer, recent=online.recent, user_quota=online.user_quota, seed=setup.seed)
    for number, record in enumerate(records, 1):
        buffer.add(Served(record, "", Mark(record.id, "")))
        for _ in range(online.steps if number % online.every_requests == 0 else 0):
            drawn = buffer.draw(setup.train.batch_size, step=learner.steps, recent=online.recent)
            learner.step([one.record for one in drawn], positions=online.positions)
    return drafter


@torch.no_grad()
def nats(drafter: CausalLMDrafter, records: Sequence[Record]) -> float:
    """Return the mean cross-entropy of a drafter on the tokens of these answers."""
    costs = []
    for record in records:
        tokens_BT, label_N = torch.tensor([record.tokens]), torch.tensor(record.loss_mask).nonzero()[:, 0]
        logits_NV = drafter.model(tokens_BT).logits[0, label_N - 1]
        costs.append(torch.nn.functional.cross_entropy(logits_NV, tokens_BT[0, label_N], reduction="none"))
    return float(torch.cat(costs).mean())


@pytest.mark.processes
def test_a_drafter_promoted_on_a_poisoned_stream_is_not_worse_on_clean_requests(
    tmp_path: Path, tiny_target: Target
) -> None:
    first = start(tmp_path, tiny_target, noise=0.1)
    online_run(tmp_path, tiny_target, first)
    # The text of the target does not depend on the drafter.
    wanted = prompts(0, STREAM + NONSENSE + TESTED)
    serve(tiny_target, tmp_path / "run" / "drafters", tmp_path / "all" / "a.jsonl", wanted)
    lines = read_log(tmp_path / "all" / "a.jsonl")
    own, tested = lines[: STREAM + NONSENSE], [record_of(line) for line in lines[-TESTED:]]
    draws = random.Random(0)
    forged = nonsense(own[STREAM:], draws)
    poisoned = [*own[:STREAM], *forged]
    order = draws.sample(range(len(own)), len(own))
    setups = {}
    for loss in (CrossEntropy, ForwardKL):
        folder = tmp_path / loss.__name__
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "a.jsonl").write_text("".join(json.dumps(poisoned[number]) + "\n" for number in order))
        run = online_run(folder, tiny_target, first, loss=loss)
        run.learn_once()
        versions = run.routes[""].versions
        found = gain(tiny_target, read_drafter(versions.path(versions.current()), tiny_target), first, tested)
        assert found.high >= 0
        # If the target provides the labels, forged answers do not prevent the promotion of a better drafter.
        assert found.low > 0 or loss is CrossEntropy
        setups[loss] = run.setup
    # Hard labels come from the log, so without filter and promotion test the drafter gets worse and learns the forged answers.
    # (With so few requests it also gets worse on clean ones only. The promotion test prevents this.)
    learned, not_poisoned = (
        unguarded(setups[CrossEntropy], first, [record_of(stream[number]) for number in order])
        for stream in (poisoned, own)
    )
    assert gain(tiny_target, learned, first, tested).high < 0
    wrong = [record_of(line) for line in forged]
    assert nats(learned, wrong) < nats(not_poisoned, wrong) - 0.5
