"""A recorder that is killed at seeded moments loses no record that it acknowledged, and none is read twice."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import aiohttp
import pytest

from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.recorder.intake import Intake
from tests.data_gen.serving_logs.log_lines import chat_encoder
from tests.recorder.openai_server import Server, chat_request, post, served, status
from tests.recorder.process import Process

KILLS = [pytest.param(3, marks=pytest.mark.processes), pytest.param(20, marks=pytest.mark.slow)]
ENCODER = chat_encoder(max_length=64)
Moments = Iterator[float]
"""Seconds from the first acknowledged record until the kill."""


def moments(kind: str, *, longest: float) -> Moments:
    draws = random.Random(kind)
    while True:
        yield draws.uniform(0, longest)


async def recorded_until_killed(upstream: str, logs: Path, names: Iterator[str], moment: float) -> list[str]:
    """Send requests through a new recorder until it is killed. Return the requests that it acknowledged as written."""
    process, asked, written = await asyncio.to_thread(Process, upstream, logs), [], 0
    try:
        async with aiohttp.ClientSession() as session:
            while True:
                asked.append(next(names))
                await post(session, process.address, chat_request(asked[-1], stream=len(asked) % 2 == 0))
                before, written = written, (await status(session, process.address))["written"]
                if written and not before:
                    asyncio.get_running_loop().call_later(moment, os.kill, process.pid, signal.SIGKILL)
    except (aiohttp.ClientError, ConnectionError):
        # There is one client, so records are written in the order of the requests.
        code, _ = await asyncio.to_thread(process.stop, signal.SIGKILL)
        assert code == -signal.SIGKILL
    return asked[:written]


def taken(logs: Path, folder: Path) -> list[str]:
    """Read the logs as a process that was just started. Return the questions of all records that were ever read."""
    reader = Intake(ServingLogsSettings(path=str(logs), near_duplicates=None), ENCODER, folder)
    while reader.take(max_lines=5) is not None:
        pass
    texts = [ENCODER.tokenizer.decode(one.record.tokens) for one in reader.served()]
    return [re.findall(r"Question \d+", text)[0] for text in texts]


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_recorder_loses_no_acknowledged_record(tmp_path: Path, kills: int) -> None:
    logs, acknowledged = tmp_path / "logs", []
    names, when = (f"Question {number}" for number in count()), moments("recorder", longest=0.5)

    async def run() -> None:
        async with served(Server().app()) as upstream:
            for _ in range(kills):
                acknowledged.extend(await recorded_until_killed(upstream, logs, names, next(when)))
                taken(logs, tmp_path / "taken")

    asyncio.run(run())
    found = Counter(taken(logs, tmp_path / "taken"))
    lost, twice = set(acknowledged) - set(found), [name for name, times in found.items() if times > 1]
    print(f"\n| recorder | {kills} | {len(acknowledged)} records acknowledged | {len(lost)} | {len(twice)} | n/a |")
    assert len(acknowledged) >= kills
    assert not lost
    assert not twice
