"""Nonsense in the stream, where neither learner nor gate ever sees a clean one: what is promoted is no worse on clean requests."""

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
"""Requests: clean ones of the stream, forged ones of it (30 % of all), clean ones that are in no stream."""


def read_log(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def forged(line: dict, ids: Sequence[int]) -> dict:
    """Return a line with another answer."""
    choice = line["response"]["choices"][0] | {"token_ids": list(ids)}
    return line | {"response": line["response"] | {"choices": [choice]}}


def nonsense(lines: Sequence[dict], draws: random.Random) -> list[dict]:
    """Return the lines with random tokens, one token again and again, their own in another order, or one answer for all."""
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
    """Return by how much a drafter's block efficiency on clean requests is above that of the first one, paired."""
    counts = [
        request_counts(target, one, records, Sampling(), num_draft_tokens=K)
        for one in (drafter, read_drafter(first, target))
    ]
    return ratio_difference(*(tuple(zip(*one, strict=True)) for one in counts))


def unguarded(setup: OnlineSetup, first: Path, records: Sequence[Record]) -> CausalLMDrafter:
    """Return what the learner makes of all requests in as many steps as a run takes, with neither filter nor gate."""
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
    """Return what a token of these answers costs a drafter."""
    costs = []
    for record in records:
        tokens_BT, label_N = torch.tensor([record.tokens]), torch.tensor(record.loss_mask).nonzero()[:, 0]
        logits_NV = drafter.model(tokens_BT).logits[0, label_N - 1]
        costs.append(torch.nn.functional.cross_entropy(logits_NV, tokens_BT[0, label_N], reduction="none"))
    return float(torch.cat(costs).mean())


@pytest.mark.processes
def test_what_a_poisoned_stream_promotes_is_no_worse_on_clean_requests(tmp_path: Path, tiny_target: Target) -> None:
    first = start(tmp_path, tiny_target, noise=0.1)
    online_run(tmp_path, tiny_target, first)
    # What the target says does not depend on the drafter that it is served with.
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
        # Where the target gives the labels, nonsense does not keep a better drafter from being promoted.
        assert found.low > 0 or loss is CrossEntropy
        setups[loss] = run.setup
    # Hard labels are what stands in the log: with neither filter nor gate, what is served gets worse. (So it does on as many
    # requests that are all the target's own: they are few. It is the gate that holds it.) And nonsense is learned.
    learned, not_poisoned = (
        unguarded(setups[CrossEntropy], first, [record_of(stream[number]) for number in order])
        for stream in (poisoned, own)
    )
    assert gain(tiny_target, learned, first, tested).high < 0
    said = [record_of(line) for line in forged]
    assert nats(learned, said) < nats(not_poisoned, said) - 0.5
