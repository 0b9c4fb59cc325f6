"""The whole loop on loopback: server, recorder and learner. The traffic changes in the middle, and the drafter adapts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest

from drafttrain.config.load import load_recipe
from drafttrain.core.texts import Record
from drafttrain.eval.statistics import ratio_difference
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.drift import drift
from drafttrain.online.learner import Learner
from drafttrain.online.loop import OnlineRun
from drafttrain.online.run_files import metrics, status
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.online_run import online_run, report
from tests.online.target_server import TargetServer, ask, decoded_again, own_texts, shipped
from tests.recorder.openai_server import recorded, served
from tests.recorder.openai_server import status as recorder_status

MAX_TOKENS = 32
BURST = 24
"""Requests between two updates."""
SETTINGS = [
    "data.max_length=80",
    f"online.every_requests={BURST}",
    "online.steps=16",
    "online.held_out=0.33",
    "online.window=16",
    "online.min_held_out=6",
    "online.parity_prompts=1",
    "online.resamples=500",
]


def tuned(run: DrafterRun, lines: Sequence[dict], *, steps: int) -> None:
    """Train the first drafter of the run on earlier requests."""
    records = []
    for line in lines:
        choice = line["response"]["choices"][0]
        prompt, answer = choice["prompt_token_ids"], choice["token_ids"]
        records.append(Record(line["id"], [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
    settings = run.recipe.train
    learner = Learner(
        run.drafter,
        ForwardKL(),
        target=run.target,
        settings=settings,
        max_length=run.recipe.data.max_length,
        num_tokens=run.target.num_tokens,
    )
    for step in range(steps):
        first = step * settings.batch_size
        batch = [records[(first + i) % len(records)] for i in range(settings.batch_size)]
        learner.step(batch, positions="all")


async def burst(address: str, prompts: Sequence[str]) -> list[str]:
    """Request one answer after another, every other one as a stream. Return the texts that the client receives."""
    async with aiohttp.ClientSession() as session:
        return [
            await ask(session, address, prompt, stream=number % 2 == 1, max_tokens=MAX_TOKENS)
            for number, prompt in enumerate(prompts)
        ]


async def the_loop(run: OnlineRun, server: TargetServer, logs: Path, bursts: Sequence[Sequence[str]]) -> list[str]:
    """Serve bursts through the recorder and learn from its logs between them. Return the texts that the client received."""
    texts: list[str] = []
    async with served(server.app()) as upstream, recorded(upstream, logs, token_ids=True) as (address, recorder):
        async with aiohttp.ClientSession() as session:
            for prompts in bursts:
                run.learn_once()
                texts += await burst(address, prompts)
                while (now := await recorder_status(session, address))["written"] < len(server.answered):
                    assert not now["dropped"]
                    await asyncio.sleep(0.01)
        assert not recorder.files.dropped
    return texts


@pytest.mark.processes
def test_block_efficiency_falls_when_the_traffic_changes_and_recovers(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    run = DrafterRun(load_recipe("online", [*SETTINGS, f"data.sources.0.path={logs}"]), tmp_path / "run")
    before, after = shipped("assertions"), shipped("tables")
    tuned(run, before[BURST:], steps=36)
    run.write_start(steps=36)
    learning = online_run(run.recipe, run.folder, run.target)
    server = TargetServer(run.target, tmp_path / "run" / "drafters")
    texts = [[line["request"]["prompt"] for line in lines] for lines in (before, after)]
    bursts = [texts[0][:BURST], *(texts[1][BURST * i : BURST * (i + 1)] for i in range(5))]
    received = asyncio.run(the_loop(learning, server, logs, bursts))

    # Across all versions, the text is the target's own, and the client receives it unchanged.
    answered = server.answered
    for one, own, text in zip(
        answered, own_texts(run.target, [one.generation for one in answered]), received, strict=True
    ):
        assert list(map(int, one.generation.tokens)) == own, one.generation.id
        assert text == run.target.tokenizer.decode(own, skip_special_tokens=True)
    assert len({one.version for one in answered}) > 1
    assert status(tmp_path / "run")["lines"] == {"used": len(answered) - BURST}

    counts = [[one.counts for one in answered[BURST * i : BURST * (i + 1)]] for i in range(len(bursts))]
    # The drop: the same drafter on requests of both kinds.
    assert {one.version for one in answered[: 2 * BURST]} == {"0000"}
    assert drift(counts[0], counts[1], resamples=2000, seed=0).p_value < 0.05
    # The recovery: last version against the first one on the last requests, which were not trained on when they were served.
    last = answered[-BURST:]
    assert {one.version for one in last} != {"0000"}
    first = decoded_again(run.target, learning.routes[""].versions.path("0000"), [one.generation for one in last])
    parts = [tuple(zip(*(one.counts for one in some), strict=True)) for some in (last, first)]
    assert ratio_difference(*parts).low > 0
    # The report shows the block efficiency of the server's own rounds.
    rows = metrics(tmp_path / "run")
    served = [row["served_block_efficiency"] for row in rows]
    assert served == [sum(n for n, _ in some) / sum(r for _, r in some) for some in counts[: len(served)]]
    report(run.folder, title="switch")
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("published") >= 2
