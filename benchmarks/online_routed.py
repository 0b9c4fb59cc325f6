"""Compares two routed drafters with one shared drafter of the same size, on a stream in which two kinds of traffic alternate.

    python benchmarks/online_routed.py OUT

The stream is the shipped log (assertions, tables), one request of each kind in turn, with the target's 20 best log-probabilities.
Every arm is a run of the online loop over the whole stream, without the gate. The learned drafters are exported and compared. The
learning rate of each arm is chosen by block efficiency of greedy replay on validation requests. The test requests are read once, at the
end. If the command is run again, finished parts are loaded.
"""

import argparse
import datetime
import itertools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from serving_log import KINDS, NEW_TOKENS, prompts

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.online.target_server import shipped

from drafttrain.checkpoint import About, read_drafter
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.sources import sources
from drafttrain.drafters.causal_lm.cut import cut_from
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.export.hf import export_hf
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.loop import OnlineRun
from drafttrain.online.promotion import request_counts
from drafttrain.online.route import OnlineSetup
from drafttrain.online.router import Router
from drafttrain.online.run_files import metrics
from drafttrain.online.settings import OnlineSettings, RouterSettings
from drafttrain.recorder.intake import Intake
from drafttrain.target_model import Target, TargetSettings
from drafttrain.training.settings import TrainSettings

K = 5
"""Draft tokens."""
HELD_OUT = 48
"""Validation requests of each kind, and as many test requests."""
MAX_LENGTH = 96
TOP = 20
EVERY = 48
"""Requests between two updates of the shared drafter."""


@dataclass(frozen=True)
class Arm:
    """How an arm learns."""

    router: Literal["tag"] | None
    every: int
    """Requests of a route between two updates."""
    batch_size: int


ARMS = {
    "shared": Arm(None, EVERY, 16),
    "half the updates": Arm("tag", EVERY, 16),
    "half the batch": Arm("tag", EVERY // 2, 8),
    "twice the tokens": Arm("tag", EVERY // 2, 16),
}
"""A routed arm is named by how a route differs from the shared drafter. The first two use as many tokens as the shared one."""
SIZES = {"two layers": None, "one layer": 64}
"""builtin:drafter as it is, or its first layer with this many feed-forward neurons."""
BUDGETS = {"one layer": [4, 24], "two layers": [4]}
"""Optimizer steps per update, by size."""
Counts = list[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    size: str
    steps: int
    """Per update."""
    arm: str
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.size}-{self.steps}-{self.arm}-{self.rate:g}-{self.seed}".replace(" ", "_")


class Bench:
    """Target, stream, held-out requests, and the folder of all runs."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.target = Target.load(TargetSettings(model="builtin:target"))
        if not (out / "held_out.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            self._write_stream()
            self._write_held_out()
        held_out = json.loads((out / "held_out.json").read_text(encoding="utf-8"))
        self.validation, self.test = (
            [
                Record(
                    one["id"],
                    one["tokens"],
                    [False] * one["prompt"] + [True] * (len(one["tokens"]) - one["prompt"]),
                    domain=one["domain"],
                )
                for one in held_out[side]
            ]
            for side in ("validation", "test")
        )
        for size in SIZES:
            if not self.start(size).exists():
                self._write_start(size)

    def _write_stream(self) -> None:
        """Write the shipped log, its kinds in turn, with the target's log-probabilities of every token."""
        (self.out / "logs").mkdir(exist_ok=True)
        lines = [line for pair in zip(*(shipped(kind) for kind in KINDS), strict=True) for line in pair]
        with (self.out / "logs" / "stream.jsonl").open("w", encoding="utf-8") as file:
            for line in lines:
                (choice,) = line["response"]["choices"]
                prompt, answer = choice["prompt_token_ids"], choice["token_ids"]
                choice["logprobs"] = {"content": self._log_probabilities(prompt, answer)}
                file.write(json.dumps(line) + "\n")

    def _log_probabilities(self, prompt: list[int], answer: list[int]) -> list[dict[str, object]]:
        record = Record("", [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        batch, _ = pack([record], width=len(record.tokens), weight_of_step=1.0)
        with torch.no_grad():
            seen = self.target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
            rows_N = torch.arange(len(prompt) - 1, len(record.tokens) - 1)
            log_p_NV = self.target.rows_of(seen).at(rows_N)[:, : self.target.num_tokens].float().log_softmax(-1)
        best_NK = log_p_NV.topk(TOP)
        found = []
        for number, token in enumerate(answer):
            pairs = zip(best_NK.indices[number].tolist(), best_NK.values[number].tolist(), strict=True)
            tops = [{"token": f"token_id:{one}", "logprob": value} for one, value in pairs]
            found.append(
                {"token": f"token_id:{token}", "logprob": float(log_p_NV[number, token]), "top_logprobs": tops}
            )
        return found

    def _write_held_out(self) -> None:
        """Write requests of both kinds whose prompts are not in the stream."""
        sides: dict[str, list[dict[str, object]]] = {"validation": [], "test": []}
        for kind in KINDS:
            known = {tuple(line["response"]["choices"][0]["prompt_token_ids"]) for line in shipped(kind)}
            fresh = (task for task in prompts(self.target, kind) if tuple(task.prompt) not in known)
            tasks = [task for task, _ in zip(fresh, range(2 * HELD_OUT), strict=False)]
            for start in range(0, len(tasks), 16):
                some = tasks[start : start + 16]
                answers = continuations(some, self.target, max_new_tokens=NEW_TOKENS, seed=0)
                for number, (task, answer) in enumerate(zip(some, answers, strict=True), start=start):
                    tokens = [*map(int, task.prompt), *map(int, answer)]
                    value = {"id": task.id, "domain": kind, "tokens": tokens, "prompt": len(task.prompt)}
                    sides["validation" if number % 2 else "test"].append(value)
        write_json(self.out / "held_out.json", sides)

    def start(self, size: str) -> Path:
        """Return the folder of the drafter that all arms of this size start with."""
        return self.out / "start" / size.replace(" ", "_")

    def _write_start(self, size: str) -> None:
        settings = CausalLMSettings(init="checkpoint", checkpoint="builtin:drafter")
        drafter = CausalLMDrafter.create(settings, target=self.target, tokenizer=self.target.tokenizer)
        if SIZES[size]:
            drafter = CausalLMDrafter(cut_from(drafter.model, [0], width=SIZES[size]))
        self.export(drafter, self.start(size))

    def export(self, drafter: CausalLMDrafter, folder: Path) -> None:
        """Write a drafter in the form that serving stacks load."""
        weights = folder.with_name(folder.name + ".weights")
        drafter.save(weights)
        target = self.target
        about = About("causal_lm", target.name, target.fingerprint, target.tokenizer_fingerprint, target.num_tokens, 0)
        export_hf(weights, folder, tokenizer=target.tokenizer, about=about, dtype="bfloat16")
        shutil.rmtree(weights)

    def learned(self, cell: Cell) -> dict[str, Path]:
        """Return the exported drafters of an arm by route; train them first if they do not exist."""
        folder = self.out / "cells" / cell.name
        if not (folder / "done.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            began = time.process_time()
            run = self._run(cell, folder)
            run.learn_once()
            rows = metrics(folder)
            for name, route in run.routes.items():
                self.export(route.learner.drafter, folder / "learned" / (name or "all"))
            about = {"positions": sum(row["positions"] for row in rows), "updates": len(rows)}
            for part in ("online", "drafters"):
                shutil.rmtree(folder / part)
            write_json(folder / "done.json", about | {"seconds": round(time.process_time() - began, 1)})
        return {path.name: path for path in sorted((folder / "learned").iterdir())}

    def _run(self, cell: Cell, folder: Path) -> OnlineRun:
        arm = ARMS[cell.arm]
        online = OnlineSettings(
            positions="all",
            every_requests=arm.every,
            steps=cell.steps,
            held_out=0.25,
            # More than there are requests: no candidate, no test for drift.
            window=4096,
            min_held_out=4096,
            implausible=None,
            max_lines=10_000,
            router=RouterSettings(kind=arm.router, routes=list(KINDS)) if arm.router else None,
        )
        setup = OnlineSetup(
            target=self.target,
            online=online,
            train=TrainSettings(batch_size=arm.batch_size, lr=cell.rate, schedule="constant", warmup_steps=4),
            loss=ForwardKL,
            max_length=MAX_LENGTH,
            num_draft_tokens=K,
            dtype="bfloat16",
            seed=cell.seed,
        )
        source = sources.entry("serving_logs").settings(path=str(self.out / "logs"), near_duplicates=None)
        intake = Intake(source, Encoder(self.target.tokenizer, MAX_LENGTH), folder / "online" / "intake")
        return OnlineRun(setup, intake, folder, start=self.start(cell.size))

    def counts(self, folder: Path, records: Sequence[Record]) -> Counts:
        """Return tokens and rounds of each request with the drafter in a folder."""
        drafter = read_drafter(folder, self.target)
        return request_counts(self.target, drafter, records, Sampling(), num_draft_tokens=K)

    def validated(self, cell: Cell) -> float:
        """Return block efficiency on the validation requests, routed by tag."""
        file = self.out / "cells" / cell.name / "validation.json"
        if not file.exists():
            served: Counts = []
            for name, folder in self.learned(cell).items():
                served += self.counts(folder, [one for one in self.validation if name in ("all", one.domain)])
            write_json(file, {"block_efficiency": efficiency(served)})
            print(f"{cell.name}: validation {efficiency(served):.3f}", file=sys.stderr, flush=True)
        return float(json.loads(file.read_text(encoding="utf-8"))["block_efficiency"])

    def best_rate(self, size: str, steps: int, arm: str, rates: Sequence[float]) -> float:
        """Return the best rate of the grid; if it is at an end, the grid is extended there."""
        found = {rate: self.validated(Cell(size, steps, arm, rate)) for rate in rates}
        while len(found) < len(rates) + 2:
            best = max(found, key=lambda rate: found[rate])
            if best not in (min(found), max(found)):
                break
            further = best * 3 if best == max(found) else best / 3
            found[further] = self.validated(Cell(size, steps, arm, further))
        return max(found, key=lambda rate: found[rate])

    def classifier(self, examples: int) -> Router:
        """Return the small text classifier, trained on the first requests of the stream."""
        router = Router(RouterSettings(kind="classifier", routes=list(KINDS)))
        with (self.out / "logs" / "stream.jsonl").open(encoding="utf-8") as file:
            for text in itertools.islice(file, examples):
                line = json.loads(text)
                (choice,) = line["response"]["choices"]
                prompt, answer = choice["prompt_token_ids"], choice["token_ids"]
                mask = [False] * len(prompt) + [True] * len(answer)
                router.learn([Record(line["id"], [*prompt, *answer], mask, domain=line["domain"])])
        return router


def efficiency(counts: Counts) -> float:
    """Return block efficiency."""
    return sum(tokens for tokens, _ in counts) / sum(rounds for _, rounds in counts)


def columns(counts: Counts) -> tuple[tuple[float, ...], ...]:
    """Return the tokens and the rounds of requests."""
    return tuple(zip(*counts, strict=True))


def interval(counts: Counts) -> str:
    """Return block efficiency with its interval over requests."""
    return str(ratio_interval(*columns(counts)))


def difference(first: Counts, second: Counts) -> str:
    """Return the paired difference with its interval."""
    return str(ratio_difference(columns(first), columns(second)))


def main() -> None:
    """Train every arm, choose the rates, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 9e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 24], help="optimizer steps per update to try")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of the batches; rates are chosen with seed 0"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.out)
    for examples in (RouterSettings.min_examples, 480):
        router = bench.classifier(examples)
        print(accuracy(router, [*bench.validation, *bench.test]))
    for size, steps in (
        (size, steps) for size, budgets in BUDGETS.items() for steps in budgets if steps in arguments.steps
    ):
        rates = {arm: bench.best_rate(size, steps, arm, arguments.rates) for arm in ARMS}
        for seed in arguments.seeds:
            cells = {arm: Cell(size, steps, arm, rates[arm], seed) for arm in ARMS}
            print(f"\n{size}, {steps} steps per update, seed {seed}\n\n{table(bench, cells, router)}", flush=True)
    print(f"\n{len(bench.test)} test requests, {datetime.date.today()}, commit {commit()}, {processor()}")


def accuracy(router: Router, records: Sequence[Record]) -> str:
    """Return how many requests the classifier routes by their tag."""
    right = sum(router.route_of_prompt(prompt_of(one)) == one.domain for one in records)
    return f"classifier after {router.examples} tagged requests: {right} of {len(records)} held-out ones are routed by their tag"


def prompt_of(record: Record) -> list[int]:
    """Return the prompt of a record."""
    return list(record.tokens[: len(record.tokens) - sum(record.loss_mask)])


HEADER = (
    "| arm | rate | updates, all | trained tokens, all | block efficiency | minus shared, paired | assertions | minus shared | tables "
    "| minus shared | by the classifier | on the other route |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(bench: Bench, cells: dict[str, Cell], router: Router) -> str:
    """Return block efficiency of the arms on the test requests, and the difference from the shared drafter on the same ones."""
    test = bench.test
    tags = [one.domain for one in test]
    classified = [router.route_of_prompt(prompt_of(one)) for one in test]
    exchanged = [next(kind for kind in KINDS if kind != tag) for tag in tags]
    start = bench.counts(bench.start(cells["shared"].size), test)
    shared = bench.counts(bench.learned(cells["shared"])["all"], test)
    lines = [HEADER, f"| before | | | | {figures(start, shared, tags)} | | |"]
    for arm, cell in cells.items():
        folders = bench.learned(cell)
        done = json.loads((bench.out / "cells" / cell.name / "done.json").read_text(encoding="utf-8"))
        head = f"| {arm} | {cell.rate:g} | {done['updates']} | {done['positions']:,}"
        if arm == "shared":
            lines.append(f"{head} | {figures(shared, shared, tags)} | | |")
            continue
        by_route = {name: bench.counts(folder, test) for name, folder in folders.items()}
        by_tag, by_words, by_other = (
            [by_route[route][place] for place, route in enumerate(routes)] for routes in (tags, classified, exchanged)
        )
        ends = f"{efficiency(by_words):.3f} | {efficiency(by_other):.3f}"
        lines.append(f"{head} | {figures(by_tag, shared, tags)} | {ends} |")
    return "\n".join(lines)


def figures(counts: Counts, shared: Counts, tags: Sequence[str]) -> str:
    """Return block efficiency and its difference from the shared drafter's: of all requests, then by kind."""
    cells = [interval(counts), difference(counts, shared)]
    for kind in KINDS:
        own, others = (kept(some, tags, kind) for some in (counts, shared))
        cells += [f"{efficiency(own):.3f}", difference(own, others)]
    return " | ".join("" if counts is shared and number % 2 else cell for number, cell in enumerate(cells))


def kept(counts: Counts, tags: Sequence[str], kind: str) -> Counts:
    """Return the counts of one kind's requests."""
    return [pair for pair, tag in zip(counts, tags, strict=True) if tag == kind]


if __name__ == "__main__":
    main()
