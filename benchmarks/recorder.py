"""Measures the latency per token that the recorder adds: 50 streams of a paced server, 20 ms per token.

Server, recorder and clients are three processes. The server writes the time of sending into every event. The latency of a token is the
client's time of arrival minus that time. In each turn there are four rounds, in random order: to the server, to the server again,
through a relay that only passes bytes on, and through the recorder. The second round to the server shows the noise. The relay shows the
cost of any process in between. The added latency is the difference of the percentiles of all tokens. Its interval is that of the mean,
over turns, of the same difference within a turn. The last rows are medians over turns.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time

import aiohttp
import numpy as np
from aiohttp import web

from drafttrain.core.provenance import commit, processor
from drafttrain.eval.statistics import ratio_difference

WAYS = ["direct", "direct again", "relay", "recorder"]


def main() -> None:
    """Measure and print the table, or run as the server or the relay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="run as the paced server")
    parser.add_argument("--relay", metavar="PORT", type=int, help="run as the relay in front of this port")
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--turns", type=int, default=20, help="number of turns, each with a round of each kind")
    parser.add_argument(
        "--logprobs",
        type=int,
        default=0,
        help="number of log-probabilities that the recorder requests and removes from the answers",
    )
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.milliseconds / 1000))
    elif arguments.relay:
        asyncio.run(relay(arguments.relay))
    else:
        asyncio.run(measure(arguments))


async def serve(pause: float) -> None:
    """Serve; write a token every `pause` seconds to each stream."""

    async def answer(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        top = [{"token": f" token{n}", "logprob": -float(n)} for n in range(asked.get("top_logprobs") or 0)]
        due = time.monotonic() + random.uniform(0, pause)
        for number in range(asked["max_tokens"]):
            await asyncio.sleep(due - time.monotonic())
            due += pause
            choice = {"index": 0, "delta": {"content": f" word{number}"}, "finish_reason": None, "logprobs": None}
            if top:
                choice["logprobs"] = {"content": [{"token": f" word{number}", "logprob": -0.1, "top_logprobs": top}]}
            chunk = {
                "id": "r",
                "object": "chat.completion.chunk",
                "model": "m",
                "choices": [choice],
                "sent": time.monotonic(),
            }
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"serving http://127.0.0.1:{runner.addresses[0][1]} ", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


async def relay(port: int) -> None:
    """Pass bytes on in both directions."""

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(2**16):
                writer.write(piece)
        writer.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(passed(reader, upstream_writer), passed(upstream_reader, writer))

    server = await asyncio.start_server(both, "127.0.0.1", 0)
    print(f"serving http://127.0.0.1:{server.sockets[0].getsockname()[1]} ", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


async def measure(arguments: argparse.Namespace) -> None:
    """Start the processes, take turns, print the table."""
    with tempfile.TemporaryDirectory() as out:
        server = started([sys.executable, __file__, "--serve", "--milliseconds", str(arguments.milliseconds)])
        between = started([sys.executable, __file__, "--relay", server[1].rpartition(":")[2]])
        more = ["--logprobs", str(arguments.logprobs)] if arguments.logprobs else []
        command = ["record", "--upstream", server[1], "--port", "0", "--out", out, *more]
        recorder = started([sys.executable, "-m", "drafttrain", *command])
        addresses = dict(zip(WAYS, (server[1], server[1], between[1], recorder[1]), strict=True))
        milliseconds: dict[str, list[np.ndarray]] = {name: [] for name in WAYS}
        draws = random.Random(0)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for address in addresses.values():
                await a_round(session, address, arguments)
            busy = cpu_seconds(recorder[0].pid)
            for _ in range(arguments.turns):
                for name in draws.sample(WAYS, len(WAYS)):
                    milliseconds[name].append(await a_round(session, addresses[name], arguments))
            busy = cpu_seconds(recorder[0].pid) - busy
            async with session.get(recorder[1] + "/_recorder") as answer:
                status = await answer.json()
        for process, _ in (recorder, between, server):
            process.terminate()
            process.wait()
    report(arguments, milliseconds, busy, status)


def started(command: list[str]) -> tuple[subprocess.Popen, str]:  # type: ignore[type-arg]
    """Start a process; return it with the address it listens on, read from its first line."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"(?:recording on|serving) (http://127\.0\.0\.1:\d+) ", line)
    assert found, line
    return process, found.group(1)


async def a_round(session: aiohttp.ClientSession, address: str, arguments: argparse.Namespace) -> np.ndarray:
    """Return the milliseconds of every token of all streams."""

    async def stream(number: int) -> list[float]:
        asked = {
            "model": "m",
            "stream": True,
            "max_tokens": arguments.tokens,
            "messages": [{"role": "user", "content": f"Stream {number} of {time.monotonic()}"}],
        }
        seconds = []
        async with session.post(address + "/v1/chat/completions", json=asked) as answer:
            async for line in answer.content:
                now = time.monotonic()
                if line.startswith(b"data: {"):
                    seconds.append(now - json.loads(line[6:])["sent"])
        return seconds

    streams = await asyncio.gather(*(stream(number) for number in range(arguments.streams)))
    assert all(len(one) == arguments.tokens for one in streams)
    return 1000 * np.array(streams).ravel()


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds that a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(arguments: argparse.Namespace, milliseconds: dict, busy: float, status: dict) -> None:  # type: ignore[type-arg]
    """Print the table."""
    by_way = {name: np.stack(rounds) for name, rounds in milliseconds.items()}
    direct = by_way[WAYS[0]]
    print(
        f"{arguments.streams} streams, {arguments.milliseconds:g} ms per token, {arguments.tokens} tokens per stream, {len(direct)} rounds each; "
        f"{os.cpu_count()} cores of {processor()}, load {os.getloadavg()[1]:.1f}; {datetime.date.today()}, commit {commit()}\n"
    )
    compared = [*((name, "direct") for name in WAYS[1:]), ("recorder", "relay")]
    print(f"| ms per token | direct | {' | '.join(f'{one} - {other}' for one, other in compared)} |")
    print("|---|---|" + "---|" * len(compared))
    for percent in (50, 90, 99):
        of_all = {name: np.percentile(rounds, percent) for name, rounds in by_way.items()}
        cells = [f"{of_all[one] - of_all[other]:.2f}" for one, other in compared]
        print(f"| p{percent} of all tokens | {of_all[WAYS[0]]:.2f} | {' | '.join(cells)} |")
    for percent in (50, 90, 99):
        of_round = {name: np.percentile(rounds, percent, axis=1) for name, rounds in by_way.items()}
        ones = np.ones(len(direct))
        cells = [ratio_difference((of_round[one], ones), (of_round[other], ones)).text() for one, other in compared]
        print(f"| p{percent} of a round, mean | {of_round[WAYS[0]].mean():.2f} | {' | '.join(cells)} |")
    for percent in (50, 99):
        # A shared machine sometimes stalls a round for longer than any latency that is measured here.
        of_round = {name: np.percentile(rounds, percent, axis=1) for name, rounds in by_way.items()}
        cells = [f"{np.median(of_round[one] - of_round[other]):.2f}" for one, other in compared]
        print(f"| p{percent} of a round, median | {np.median(of_round[WAYS[0]]):.2f} | {' | '.join(cells)} |")
    tokens = by_way["recorder"].size
    print(
        f"\nThe recorder used {1e6 * busy / tokens:.0f} µs of processor time per token; {status['written']} records written, "
        f"dropped: {status['dropped'] or 0}."
    )


if __name__ == "__main__":
    main()
