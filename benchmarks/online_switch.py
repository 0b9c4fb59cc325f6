"""Measures a drafter that follows its traffic: three processes serve, record and learn, and the traffic changes in the middle.

Run `python benchmarks/online_switch.py OUT` from the root. The server decodes the embedded target with the drafter that `current` names
at each request. Requests are the prompts of the shipped log, one after another at a fixed pace. `drafttrain record` is the proxy in
front of the server, and `drafttrain online run` learns from the logs alone. Block efficiency is counted from the server's own rounds.
OUT/requests.csv has every request, OUT/memory.csv the learner's memory and disk, OUT/online_switch.png the picture.
"""

import argparse
import asyncio
import csv
import datetime
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.online.target_server import Answered, TargetServer, ask, decoded_again, own_texts, shipped
from tests.recorder.openai_server import served

from drafttrain.core.provenance import commit, processor
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.online.drift import drift
from drafttrain.online.run_files import metrics
from drafttrain.target_model import Target, TargetSettings
from recorder import started

MAX_TOKENS = 48
COMPARED = 48
"""Number of last requests of each kind on which versions are compared."""
WINDOW = 24
"""Number of requests in a point of the picture."""
Counts = list[tuple[int, int]]


def main() -> None:
    """Serve, learn, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=240, help="requests of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds between two requests")
    parser.add_argument(
        "--stop-after", type=int, default=320, help="stop and restart the learner after this many requests"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = Target.load(TargetSettings(model="builtin:target"))
    kinds = [shipped(kind)[: arguments.requests] for kind in ("assertions", "tables")]
    prompts = [line["request"]["prompt"] for lines in kinds for line in lines]
    server = TargetServer(target, arguments.out / "online" / "drafters")
    texts = asyncio.run(serve(server, prompts, arguments))
    answered = server.answered
    with (arguments.out / "requests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["request", "kind", "version", "tokens", "rounds"])
        for number, one in enumerate(answered):
            writer.writerow([number, ("assertions", "tables")[number // arguments.requests], one.version, *one.counts])
    own = own_texts(target, [one.generation for one in answered])
    equal = sum(
        list(map(int, one.generation.tokens)) == ids and text == target.tokenizer.decode(ids, skip_special_tokens=True)
        for one, ids, text in zip(answered, own, texts, strict=True)
    )
    report(arguments, server, equal=equal)
    draw(arguments.out / "online_switch.png", answered, switch=arguments.requests)


async def serve(server: TargetServer, prompts: list[str], arguments: argparse.Namespace) -> list[str]:
    """Serve the prompts through the recorder while the learner learns; return the texts that the client read."""
    out, texts = arguments.out, []
    (out / "logs").mkdir(parents=True)
    learner = Learner(out)
    async with served(server.app()) as upstream, aiohttp.ClientSession() as session:
        words = ["record", "--upstream", upstream, "--port", "0", "--out", str(out / "logs"), "--token-ids"]
        recorder, address = await asyncio.to_thread(started, [sys.executable, "-m", "drafttrain", *words])
        while not (out / "online" / "drafters" / "current").is_symlink():
            await asyncio.sleep(0.2)
        for number, prompt in enumerate(prompts):
            due = time.monotonic() + arguments.seconds
            texts.append(await ask(session, address, prompt, stream=number % 2 == 1, max_tokens=MAX_TOKENS))
            if number + 1 == arguments.stop_after:
                await asyncio.to_thread(learner.stop)
                learner.start()
            if number % 10 == 0:
                learner.look(number)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        async with session.get(address + "/_recorder") as answer:
            print(f"recorder: {await answer.text()}", file=sys.stderr)
        # Whatever the learner does after the last request changes no answer.
        learner.look(len(prompts))
        await asyncio.to_thread(learner.stop)
        recorder.terminate()
        recorder.wait()
    learner.memory.close()
    return texts


class Learner:
    """The process of `drafttrain online run`, and its memory and disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.memory = (out / "memory.csv").open("w")
        self.memory.write("request,seconds,resident_mb,run_folder_mb,state_mb\n")
        self._began = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start the learner, or resume it."""
        words = ["online", "run", "online", f"data.sources.0.path={self.out / 'logs'}", "--runs", str(self.out)]
        with (self.out / "learner.log").open("a") as log:
            command = [sys.executable, "-m", "drafttrain", *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """Stop the learner by SIGTERM, as a system does."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        print(f"learner: exit code {code}, {time.monotonic() - began:.1f} s after SIGTERM", file=sys.stderr)

    def look(self, request: int) -> None:
        """Write a row with its memory and the size of its folder."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        files = [path for path in (self.out / "online").rglob("*") if path.is_file()]
        sizes = {path: path.stat().st_size for path in files if path.exists()}
        state = sizes.get(self.out / "online" / "online" / "state.pt", 0)
        seconds = time.monotonic() - self._began
        row = [pages * 4096 / 2**20, sum(sizes.values()) / 2**20, state / 2**20]
        self.memory.write(f"{request},{seconds:.0f}," + ",".join(f"{value:.1f}" for value in row) + "\n")
        self.memory.flush()


def report(arguments: argparse.Namespace, server: TargetServer, *, equal: int) -> None:
    """Print the table and the comparisons."""
    answered, half = server.answered, arguments.requests
    before, after = answered[:half], answered[half:]
    at_switch = after[0].version
    print("| requests | version | kind | block efficiency |\n|---|---|---|---|")
    for start, stop, version in spells(answered, half):
        counts = [one.counts for one in answered[start:stop]]
        kind = ("assertions", "tables")[start >= half]
        print(f"| {start + 1} to {stop} | {version} | {kind} | {interval(counts)} |")
    fall = drift(
        [one.counts for one in before[-COMPARED:]], [one.counts for one in after[:COMPARED]], resamples=10000, seed=0
    )
    print(
        f"\nlast {COMPARED} before the change, first {COMPARED} after it: {fall.then:.2f}, {fall.now:.2f}, p = {fall.p_value:.2g}"
    )
    for name, some in (("before", before), ("after", after)):
        last = some[-COMPARED:]
        first = "0000" if name == "before" else at_switch
        again = decoded_again(server.target, server.drafters / first, [one.generation for one in last])
        difference = ratio_difference(*(columns(one) for one in (last, again)))
        versions = ", ".join(sorted({one.version for one in last}))
        print(
            f"last {COMPARED} {name} the change: {versions} {interval([o.counts for o in last])}, {first} on the same "
            f"{interval([o.counts for o in again])}, paired {difference}"
        )
    print(f"texts equal to the target's own: {equal} of {len(answered)}")
    rows = metrics(arguments.out / "online")
    print(f"updates {len(rows)}, published {sum(bool(row.get('promoted')) for row in rows)}")
    print(f"{datetime.date.today()}, commit {commit()}, {processor()}")


def spells(answered: list[Answered], half: int) -> list[tuple[int, int, str]]:
    """Return (start, stop, version) of each stretch in which one version served one kind."""
    starts = [i for i, one in enumerate(answered) if i in (0, half) or one.version != answered[i - 1].version]
    return [(a, b, answered[a].version) for a, b in zip(starts, [*starts[1:], len(answered)], strict=True)]


def columns(some: list[Answered]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens and the rounds of requests."""
    return tuple(zip(*(one.counts for one in some), strict=True))


def interval(counts: Counts) -> str:
    """Return block efficiency with its interval over requests."""
    tokens, rounds = zip(*counts, strict=True)
    return ratio_interval(tokens, rounds).text()


def draw(path: Path, answered: list[Answered], *, switch: int) -> None:
    """Draw block efficiency over the requests, in windows that the change does not cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for start, stop in ((0, switch), (switch, len(answered))):
        points: list[tuple[float, Any]] = []
        for first in range(start, stop, WINDOW // 2):
            counts = [one.counts for one in answered[first : min(stop, first + WINDOW)]]
            if len(counts) == WINDOW:
                tokens, rounds = zip(*counts, strict=True)
                points.append((first + WINDOW / 2, ratio_interval(tokens, rounds)))
        middles = [x for x, _ in points]
        (line,) = axes.plot(middles, [p.value for _, p in points], color="C0")
        axes.fill_between(
            middles, [p.low for _, p in points], [p.high for _, p in points], alpha=0.2, color=line.get_color()
        )
    axes.axvline(switch, color="C3", linestyle="--", label="the traffic changes")
    published = [
        start for start, _, version in spells(answered, switch) if version != answered[start - 1].version and start
    ]
    for place, start in enumerate(published):
        axes.axvline(start, color="C2", linewidth=0.8, label="a version is published" if place == 0 else None)
    axes.set(xlabel="request", ylabel=f"block efficiency, {WINDOW} requests", xlim=(0, len(answered)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
