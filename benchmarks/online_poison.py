"""Measures, on clean traffic, what is promoted from a stream that is partly nonsense, and what an unguarded learner learns from it.

    python benchmarks/online_poison.py runs/poison [--kinds random shuffled ...] [--losses ce forward_kl] [--share 0.3]

Clean requests are the assertions of the shipped log. In a part of the stream the answers are replaced by ones that the target did not
write to these prompts. The learner and its gate see only this stream. Block efficiency is measured by greedy replay on clean requests
that are in no stream. Each stream has its own run. If the command is run again, finished runs are loaded.

promoted  the drafter that is served at the end: implausible answers are ignored, candidates are compared with the current drafter
filtered  the drafter in training of the same run, as it would be served without a gate
unguarded the control: the learner by itself on every request of the stream, with neither filter nor gate

A second table compares each drafter with the one that learned in the same way from the stream without poison. It also shows how well
the nonsense itself was learned: the negative log-likelihood, in nats per token, that a drafter gives to the forged answers.
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
from drafttrain.core.texts import Record, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.losses import losses
from drafttrain.online.buffer import ReplayBuffer
from drafttrain.online.learner import Learner
from drafttrain.online.plausible import surprise
from drafttrain.online.promotion import request_counts
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.online_run import online_run
from drafttrain.recorder.intake import Served
from drafttrain.target_model import Target

STREAM, TESTED = 180, 60
"""Requests of the stream, and clean requests of the test."""
NUM_DRAFT_TOKENS = 5
SETTINGS = [
    "online.every_requests=30",
    "online.steps=16",
    "online.window=48",
    "online.min_held_out=8",
    "online.restart_after=1000",
    "eval.length={kind: fixed, num_draft_tokens: 5}",
]
"""Learning never restarts, so the drafter in training is the one that a run without a gate would serve."""

LEARNERS = ("promoted", "filtered", "unguarded")

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
"""Random ids; one token repeated; the answer's tokens in another order; the answer to another prompt; one answer to all prompts."""
KINDS = [*FORGED, "other_model", "mixed"]
"""other_model: sampled from the drafter at temperature 1; mixed: each of the others in turn."""


def main() -> None:
    """Run every arm, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "none"], default=["none", *KINDS])
    parser.add_argument("--losses", nargs="+", default=["forward_kl", "ce"])
    parser.add_argument("--share", type=float, default=0.3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| nonsense | implausible | surprise: least | median | most |\n|---|---|---|---|---|")
    print(
        "\n".join(filter_rows(arguments.out, ["none", *(kind for kind in KINDS if kind != "mixed")], arguments.share)),
        "\n",
    )
    print(f"| loss | nonsense | implausible | published | {' | '.join(LEARNERS)} |\n|---|---|---|---|---|---|---|")
    results = {}
    for loss in arguments.losses:
        for kind in arguments.kinds:
            results[loss, kind] = learned(arguments.out / f"{loss}-{kind}", kind, loss, arguments.share)
            print(row(loss, kind, results[loss, kind]), flush=True)
    print(
        f"\n| loss | nonsense | {' | '.join(LEARNERS)} | nats: start | promoted | unguarded |\n|---|---|---|---|---|---|---|---|"
    )
    for (loss, kind), found in results.items():
        if kind != "none" and (loss, "none") in results:
            print(cost_row(loss, kind, found, results[loss, "none"]))
    print(
        f"\nblock efficiency on {TESTED} clean requests: value, and difference from the drafter that the run started with, paired over "
        f"requests; {STREAM} requests, {arguments.share:.0%} of them nonsense; {datetime.date.today()}, commit {commit()}, {processor()}"
    )


def learned(out: Path, kind: str, loss: str, share: float) -> dict[str, Any]:
    """Learn once from a stream, with the guards and without them; return the results on clean requests."""
    done = out / "learned.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    recipe = load_recipe("online", [*SETTINGS, f"loss.kind={loss}", f"data.sources.0.path={out / 'logs'}"])
    run = DrafterRun(recipe, out / "run")
    target = run.target
    run.write_start()
    lines = shipped("assertions")
    stream, forged = poisoned(target, run, lines[:STREAM], kind, share)
    write_log(out / "logs" / "log.jsonl", stream)
    learning = online_run(run.recipe, run.folder, target)
    learning.learn_once()
    (route,) = learning.routes.values()
    drafters = {
        "start": read_drafter(run.folder.start, target),
        "promoted": read_drafter(route.versions.path(route.versions.current()), target),
        "filtered": route.learner.drafter,
        "unguarded": unguarded(run, list(learning.intake.served())),
    }
    clean = [record_of(line) for line in lines[STREAM : STREAM + TESTED]]
    nonsense = [record_of(stream[number]) for number in sorted(forged)]
    found = {
        "counts": {
            which: request_counts(target, drafter, clean, Sampling(), num_draft_tokens=NUM_DRAFT_TOKENS)
            for which, drafter in drafters.items()
        },
        "nats": {which: nats(target, drafter, nonsense) for which, drafter in drafters.items()},
        "set_aside": route.counts["implausible"],
        "published": Counter(event["event"] for event in route.versions.history())["published"] - 1,
    }
    write_json(done, found)
    return found


def unguarded(run: DrafterRun, requests: Sequence[Served]) -> Drafter:
    """Return the start drafter after the same steps on all requests, forged or not; nothing is held out."""
    recipe = run.recipe
    online = recipe.online
    learner = Learner(
        read_drafter(run.folder.start, run.target, dtype="float32"),
        losses.build(recipe.loss),
        target=run.target,
        settings=recipe.train,
        max_length=recipe.data.max_length,
        num_tokens=run.target.num_tokens,
    )
    buffer = ReplayBuffer(online.buffer, recent=online.recent, user_quota=online.user_quota, seed=recipe.seed)
    for number, one in enumerate(requests, 1):
        buffer.add(one)
        for _ in range(online.steps if number % online.every_requests == 0 else 0):
            drawn = buffer.draw(recipe.train.batch_size, step=learner.steps, recent=online.recent)
            learner.step([request.record for request in drawn], positions=online.positions)
    return learner.drafter


@torch.no_grad()
def nats(target: Target, drafter: Drafter, records: Sequence[Record]) -> float | None:
    """Return a drafter's negative log-likelihood of these answers in nats per token, or None if there are none."""
    costs = []
    for record in records:
        tokens = torch.tensor([record.tokens])
        log_p_TV = drafter.model(tokens).logits[0, :-1, : target.num_tokens].double().log_softmax(-1)
        label_log_p_T = log_p_TV.gather(1, tokens[0, 1:, None])[:, 0]
        costs.append(-label_log_p_T[torch.tensor(record.loss_mask[1:])])
    return float(torch.cat(costs).mean()) if costs else None


def filter_rows(out: Path, kinds: Sequence[str], share: float) -> list[str]:
    """Return a row per kind: how many answers the filter finds implausible. This needs no learning."""
    recipe = load_recipe("online", [*SETTINGS, f"data.sources.0.path={out / 'logs'}"])
    run = DrafterRun(recipe, out / "filter")
    lines, rows = shipped("assertions")[:STREAM], []
    for kind in kinds:
        stream, forged = poisoned(run.target, run, lines, kind, share)
        chosen = sorted(forged) or range(len(stream))
        found = sorted(surprise(run.target, [record_of(stream[number]) for number in chosen]))
        implausible = sum(value > recipe.online.implausible for value in found)
        middle, end = found[len(found) // 2], found[-1]
        rows.append(f"| {kind} | {implausible} of {len(found)} | {found[0]:.1f} | {middle:.1f} | {end:.1f} |")
    return rows


def poisoned(
    target: Target, run: DrafterRun, lines: Sequence[dict[str, Any]], kind: str, share: float
) -> tuple[list[dict[str, Any]], set[int]]:
    """Return the stream with its lines in order, a part of them with forged answers, and the numbers of those lines."""
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
    return found, forged


def drawn(run: DrafterRun, target: Target, prompt: list[int], count: int, number: int) -> list[list[int]]:
    """Return a text that the drafter alone samples at temperature 1."""
    model = run.drafter.model
    torch.manual_seed(number)
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=0, temperature=1.0
    )
    return [tokens[0, len(prompt) :].tolist()]


def ids_of(line: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids of a line's prompt and answer."""
    choice = line["response"]["choices"][0]
    return choice["prompt_token_ids"], choice["token_ids"]


def with_answer(target: Target, line: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """Return a line with another answer, whose text and ids agree."""
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


def row(loss: str, kind: str, found: dict[str, Any]) -> str:
    """Return a row of the first table."""
    cells = []
    for which in LEARNERS:
        value = ratio_interval(*counts_of(found, which)).value
        cells.append(f"{value:.2f}, {difference(counts_of(found, which), counts_of(found, 'start'))}")
    return f"| {loss} | {kind} | {found['set_aside']} | {found['published']} | {' | '.join(cells)} |"


def cost_row(loss: str, kind: str, found: dict[str, Any], clean: dict[str, Any]) -> str:
    """Return a row of the second table."""
    cells = [difference(counts_of(found, which), counts_of(clean, which)) for which in LEARNERS]
    cells += [f"{found['nats'][which]:.2f}" for which in ("start", "promoted", "unguarded")]
    return f"| {loss} | {kind} | {' | '.join(cells)} |"


def counts_of(found: dict[str, Any], which: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a drafter's tokens and rounds by request."""
    tokens, rounds = zip(*found["counts"][which], strict=True)
    return tokens, rounds


def difference(ours: tuple[tuple[float, ...], ...], theirs: tuple[tuple[float, ...], ...]) -> str:
    """Return the paired difference of two block efficiencies."""
    return str(ratio_difference(ours, theirs))


if __name__ == "__main__":
    main()
