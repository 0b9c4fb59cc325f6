"""Nonsense in the stream, where neither learner nor gate ever sees a clean one: what is promoted is no worse on clean requests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from drafttrain.checkpoint import read_drafter
from drafttrain.core.records import Record, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.statistics import Interval, ratio_difference
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.buffer import ReplayBuffer
from drafttrain.online.learner import Learner
from drafttrain.online.loop import OnlineRun
from drafttrain.online.promotion import request_counts
from drafttrain.target import Target
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
    return ratio_difference(*(tuple(zip(*one, strict=True)) for one in counts), resamples=2000, seed=0)


def unguarded(run: OnlineRun, first: Path) -> Drafter:
    """Return what the learner makes of all requests in as many steps, with neither filter nor gate."""
    shop = run.shop
    learner = Learner(
        read_drafter(first, shop.target),
        shop.loss(),
        target=shop.target,
        settings=shop.train,
        max_length=shop.max_length,
        num_tokens=shop.target.num_tokens,
    )
    online = shop.online
    buffer = ReplayBuffer(online.buffer, recent=online.recent, user_quota=online.user_quota, seed=shop.seed)
    for number, one in enumerate(run.intake.served(), 1):
        buffer.add(one)
        for _ in range(online.steps if number % online.every_requests == 0 else 0):
            drawn = buffer.draw(shop.train.batch_size, step=learner.steps, recent=online.recent)
            learner.step([request.record for request in drawn], positions=online.positions)
    return learner.drafter


@pytest.mark.processes
def test_what_a_poisoned_stream_promotes_is_no_worse_on_clean_requests(tmp_path: Path, tiny_target: Target) -> None:
    first = start(tmp_path, tiny_target, noise=0.2)
    online_run(tmp_path, tiny_target, first)
    # What the target says does not depend on the drafter that it is served with.
    wanted = prompts(0, STREAM + NONSENSE + TESTED)
    serve(tiny_target, tmp_path / "run" / "drafters", tmp_path / "all" / "a.jsonl", wanted)
    lines = read_log(tmp_path / "all" / "a.jsonl")
    draws = random.Random(0)
    stream = [*lines[:STREAM], *nonsense(lines[STREAM : STREAM + NONSENSE], draws)]
    draws.shuffle(stream)
    clean = [record_of(line) for line in lines[-TESTED:]]
    runs = {}
    for loss in (CrossEntropy, ForwardKL):
        (tmp_path / loss.__name__ / "logs").mkdir(parents=True)
        log = tmp_path / loss.__name__ / "logs" / "a.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in stream))
        runs[loss] = online_run(tmp_path / loss.__name__, tiny_target, first, loss=loss)
        runs[loss].once()
    gains = {}
    for loss, run in runs.items():
        versions = run.lanes[""].versions
        promoted = read_drafter(versions.path(versions.current()), tiny_target)
        gains[loss] = gain(tiny_target, promoted, first, clean)
        assert gains[loss].high >= 0
    # Where the target gives the labels, nonsense does not keep a better drafter from being promoted.
    assert gains[ForwardKL].low > 0
    # What stands in the log is what hard labels teach: with neither filter nor gate a worse drafter would be served.
    assert gain(tiny_target, unguarded(runs[CrossEntropy], first), first, clean).high < 0
