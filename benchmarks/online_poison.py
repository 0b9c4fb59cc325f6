"""A stream of which a part is nonsense: what is promoted from it, and what an unguarded learner makes of it, on clean traffic.

    python benchmarks/online_poison.py runs/poison [--kinds random shuffled ...] [--losses ce forward_kl] [--share 0.3]

Clean requests are the assertions of the shipped log. A part of the stream is exchanged for the same prompts with answers that the target
did not write to them; the learner and its gate see this one stream, and nothing else. Block efficiency is by greedy replay on clean
requests that are in no stream. Each arm is a run of its own; what is done already is taken up when the command is given again.

guarded   as a recipe has it: implausible answers set aside, candidates held against the current drafter
gated     online.implausible: null
unguarded the drafter in training of that run, as it would be served without a gate
"""

import argparse
import datetime
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.online.target_server import shipped

from drafttrain.checkpoint import read_drafter
from drafttrain.config.load import load_recipe
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit, processor
from drafttrain.core.records import Record, Sampling
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.online.promotion import request_counts
from drafttrain.pipeline.drafter_folder import write_drafter
from drafttrain.pipeline.online import online_run
from drafttrain.pipeline.run import Run
from drafttrain.target import Target

STREAM, TESTED = 180, 60
"""Requests of the stream, and clean ones that are tested on."""
NUM_DRAFT_TOKENS = 5
SETTINGS = [
    "online.every_requests=30",
    "online.steps=16",
    "online.window=48",
    "online.min_held_out=8",
    "online.restart_after=1000",
    "eval.length={kind: fixed, num_draft_tokens: 5}",
]
"""Learning never starts again, so that the drafter in training is what a run without a gate would serve."""

Forge = Callable[[list[int], list[int], list[list[int]], random.Random], list[int]]
"""(prompt, answer, answers of others, draws) -> nonsense."""


def at_random(prompt: list[int], answer: list[int], others: list[list[int]], draws: random.Random) -> list[int]:
    return [draws.randrange(4, 4096) for _ in answer]


def repeated(prompt: list[int], answer: list[int], others: list[list[int]], draws: random.Random) -> list[int]:
    return [draws.choice(answer)] * len(answer)


def shuffled(prompt: list[int], answer: list[int], others: list[list[int]], draws: random.Random) -> list[int]:
    return draws.sample(answer, len(answer))


def swapped(prompt: list[int], answer: list[int], others: list[list[int]], draws: random.Random) -> list[int]:
    return draws.choice(others)


def stuck(prompt: list[int], answer: list[int], others: list[list[int]], draws: random.Random) -> list[int]:
    return others[0]


FORGED: dict[str, Forge] = {
    "random": at_random,
    "repeated": repeated,
    "shuffled": shuffled,
    "swapped": swapped,
    "stuck": stuck,
}
"""Random ids; one token again and again; the answer's tokens in another order; the answer to another prompt; one answer to all prompts."""
KINDS = [*FORGED, "other_model", "mixed"]
"""other_model: drawn by the drafter at temperature 1; mixed: each of the others in turn."""


def main() -> None:
    """Run every arm, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "none"], default=["none", *KINDS])
    parser.add_argument("--losses", nargs="+", default=["forward_kl", "ce"])
    parser.add_argument("--share", type=float, default=0.3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| loss | nonsense | set aside | versions: guarded, gated | guarded | gated | unguarded |\n|---|---|---|---|---|---|---|"
    )
    for loss in arguments.losses:
        for kind in arguments.kinds:
            arms = {
                name: arm(arguments.out / f"{loss}-{kind}-{name}", kind, loss, name, arguments.share)
                for name in ("guarded", "gated")
            }
            print(row(loss, kind, arms), flush=True)
    print(
        f"\nblock efficiency on {TESTED} clean requests: value, and difference to the drafter that the run started with, paired over "
        f"requests; {STREAM} requests, {arguments.share:.0%} of them nonsense; {datetime.date.today()}, commit {commit()}, {processor()}"
    )


def arm(out: Path, kind: str, loss: str, name: str, share: float) -> dict[str, Any]:
    """Learn from a stream once, and return what was promoted and what was learned on clean requests."""
    done = out / "arm.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    more = ["online.implausible=null"] if name == "gated" else []
    recipe = load_recipe("online", [*SETTINGS, *more, f"loss.kind={loss}", f"data.sources.0.path={out / 'logs'}"])
    run = Run(recipe, out / "run", quiet=True)
    target = run.target
    write_drafter(run, run.drafter, run.folder.start, steps=0)
    lines = shipped("assertions")
    write_log(out / "logs" / "log.jsonl", poisoned(target, run, lines[:STREAM], kind, share))
    learning = online_run(run.recipe, run.folder, target)
    learning.once()
    (lane,) = learning.lanes.values()
    records = [record_of(line) for line in lines[STREAM : STREAM + TESTED]]
    drafters = {
        "start": read_drafter(run.folder.start, target),
        "promoted": read_drafter(lane.versions.path(lane.versions.current()), target),
        "in_training": lane.learner.drafter,
    }
    counts = {
        which: request_counts(target, drafter, records, Sampling(), num_draft_tokens=NUM_DRAFT_TOKENS)
        for which, drafter in drafters.items()
    }
    events = Counter(event["event"] for event in lane.versions.history())
    found = {"counts": counts, "implausible": lane.counts["implausible"], "published": events["published"] - 1}
    write_json(done, found)
    return found


def poisoned(
    target: Target, run: Run, lines: Sequence[dict[str, Any]], kind: str, share: float
) -> list[dict[str, Any]]:
    """Return the stream: lines in their order, a part of them with forged answers."""
    draws = random.Random(kind)
    forged = set(draws.sample(range(len(lines)), round(share * len(lines)))) if kind != "none" else set()
    answers = [ids_of(line)[1] for line in lines]
    found, turn = [], 0
    for number, line in enumerate(lines):
        if number in forged:
            kinds = [one for one in KINDS if one != "mixed"]
            chosen = kinds[turn % len(kinds)] if kind == "mixed" else kind
            turn += 1
            prompt, answer = ids_of(line)
            if chosen == "other_model":
                (nonsense,) = drawn(run, target, prompt, len(answer), number)
            else:
                nonsense = FORGED[chosen](prompt, answer, answers[:number] + answers[number + 1 :], draws)
            line = with_answer(target, line, list(map(int, nonsense)))
        found.append(line)
    return found


def drawn(run: Run, target: Target, prompt: list[int], count: int, number: int) -> list[list[int]]:
    """Return what the drafter writes by itself at temperature 1."""
    model = run.drafter.model
    torch.manual_seed(number)
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=0, temperature=1.0
    )
    return [tokens[0, len(prompt) :].tolist()]


def ids_of(line: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the prompt's and the answer's ids of a line."""
    choice = line["response"]["choices"][0]
    return choice["prompt_token_ids"], choice["token_ids"]


def with_answer(target: Target, line: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """Return a line with another answer, its text and ids of one mind."""
    choice = line["response"]["choices"][0]
    text = target.tokenizer.decode(answer, skip_special_tokens=True)
    choice = choice | {"token_ids": answer, "text": text, "finish_reason": "length"}
    return line | {"response": line["response"] | {"choices": [choice]}}


def record_of(line: dict[str, Any]) -> Record:
    """Return a line as a request to replay."""
    prompt, answer = ids_of(line)
    return Record(line["id"], [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def write_log(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write lines as a gateway does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def row(loss: str, kind: str, arms: dict[str, dict[str, Any]]) -> str:
    """Return a row of the table."""
    cells = []
    for name, which in (("guarded", "promoted"), ("gated", "promoted"), ("gated", "in_training")):
        counts = {key: tuple(zip(*value, strict=True)) for key, value in arms[name]["counts"].items()}
        value = ratio_interval(*counts[which], resamples=10000, seed=0).value
        difference = ratio_difference(counts[which], counts["start"], resamples=10000, seed=0)
        cells.append(f"{value:.2f}, {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
    published = ", ".join(str(arm["published"]) for arm in arms.values())
    return f"| {loss} | {kind} | {arms['guarded']['implausible']} | {published} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
