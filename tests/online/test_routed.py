"""Two routed drafters against a shared one of the same size, on a stream of two contradicting domains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import About, read_drafter
from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources import sources
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.eval.statistics import ratio_difference
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
from tests.conftest import byte_tokenizer, random_llama

# C = texts, T = positions, V = vocabulary

DOMAINS = ["left", "right"]
MARKS = [200, 201]
"""First token of a text, by domain."""
SYMBOLS = range(40, 72)
PROMPT, ANSWER = 5, 12
"""Tokens after the mark: a random prompt, then an answer by the rule."""
K = 4
EVERY, UPDATES = 24, 2
"""Requests between two updates, and updates per route."""


def rules() -> list[list[int]]:
    """Return for each domain the follower of each symbol: a cycle through all symbols."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in DOMAINS:
        order = torch.randperm(len(SYMBOLS), generator=draws)
        follower = torch.empty_like(order)
        follower[order] = order.roll(-1)
        found.append(follower.tolist())
    return found


def opened(domain: int, draws: torch.Generator) -> list[int]:
    """Return a random prompt. The domains differ only in the mark."""
    return [MARKS[domain], *(SYMBOLS[i] for i in torch.randint(len(SYMBOLS), (PROMPT,), generator=draws).tolist())]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target that was trained on both rules and chooses by the mark."""
    model, rule = random_llama(seed=0).train(), torch.tensor(rules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draws = torch.Generator().manual_seed(1)
    for _ in range(100):
        domain_C = torch.randint(len(DOMAINS), (32,), generator=draws)
        text_CT = torch.randint(len(SYMBOLS), (32, PROMPT), generator=draws)
        for _ in range(ANSWER):
            text_CT = torch.cat([text_CT, rule[domain_C, text_CT[:, -1]][:, None]], dim=1)
        text_CT = torch.cat([torch.tensor(MARKS)[domain_C][:, None], text_CT + SYMBOLS[0]], dim=1)
        logits_CTV = model(text_CT).logits[:, PROMPT:-1]
        loss = torch.nn.functional.cross_entropy(logits_CTV.flatten(0, 1), text_CT[:, PROMPT + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("two_rules")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Target.load(TargetSettings(model=str(folder)))


def answered(target: Target, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the answers of the target."""
    tasks = [Task(str(number), prompt, Sampling()) for number, prompt in enumerate(prompts)]
    return continuations(tasks, target, max_new_tokens=ANSWER, seed=0)


def write_log(target: Target, path: Path) -> None:
    """Write requests that alternate between the domains."""
    draws = torch.Generator().manual_seed(2)
    prompts = [opened(number % 2, draws) for number in range(2 * EVERY * UPDATES)]
    path.parent.mkdir()
    with path.open("w") as file:
        for number, (prompt, answer) in enumerate(zip(prompts, answered(target, prompts), strict=True)):
            choice = {"message": {"role": "assistant", "content": None}, "token_ids": answer, "finish_reason": "length"}
            line = {
                "id": str(number),
                "domain": DOMAINS[number % 2],
                "request": {"model": "t", "prompt": prompt},
                "response": {"model": "t", "choices": [choice]},
            }
            file.write(json.dumps(line) + "\n")


def learned(target: Target, place: Path, log: Path, router: RouterSettings | None) -> OnlineRun:
    """Return a run after it has learned from the log once."""
    settings = CausalLMSettings(num_layers=1, hidden_size=8, num_heads=1)
    torch.manual_seed(3)
    CausalLMDrafter.create(settings, target=target, tokenizer=target.tokenizer).save(place / "weights")
    about = About("causal_lm", target.name, target.fingerprint, target.tokenizer_fingerprint, 257, 0)
    export_hf(place / "weights", place / "start", tokenizer=target.tokenizer, about=about, dtype="float32")
    online = OnlineSettings(
        positions="all",
        every_requests=EVERY,
        steps=25,
        held_out=0.25,
        min_held_out=4,
        window=24,
        promote_every=UPDATES,
        parity_prompts=1,
        router=router,
    )
    setup = OnlineSetup(
        target=target,
        online=online,
        train=TrainSettings(lr=1e-2, batch_size=12, warmup_steps=0, schedule="constant"),
        loss=ForwardKL,
        max_length=40,
        num_draft_tokens=K,
        dtype="float32",
        seed=0,
    )
    source = sources.entry("serving_logs").settings(path=str(log), near_duplicates=None)
    run = OnlineRun(
        setup, Intake(source, Encoder(target.tokenizer, 40), place / "online" / "intake"), place, start=place / "start"
    )
    run.learn_once()
    return run


Counts = list[tuple[float, float]]


def counted(target: Target, folders: Sequence[Path], prompts: Sequence[list[int]]) -> Counts:
    """Return tokens and rounds of each prompt, served with the drafter of its folder."""
    records = [
        Record(str(number), [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for number, (prompt, answer) in enumerate(zip(prompts, answered(target, prompts), strict=True))
    ]
    found: dict[int, tuple[float, float]] = {}
    for folder in set(folders):
        own = [number for number, one in enumerate(folders) if one == folder]
        drafter = read_drafter(folder, target)
        counts = request_counts(target, drafter, [records[number] for number in own], Sampling(), num_draft_tokens=K)
        found |= dict(zip(own, counts, strict=True))
    return [found[number] for number in range(len(prompts))]


def gain(first: Counts, second: Counts):
    """Return the difference of block efficiency, first minus second, paired over prompts."""
    parts = [tuple(zip(*counts, strict=True)) for counts in (first, second)]
    return ratio_difference(parts[0], parts[1])


@pytest.mark.long
def test_two_routed_drafters_beat_a_shared_one_and_each_is_worse_on_the_other_route(tmp_path: Path, target: Target):
    log = tmp_path / "logs" / "a.jsonl"
    write_log(target, log)
    for name in ("shared", "routed"):
        (tmp_path / name).mkdir()
    settings = RouterSettings(kind="classifier", routes=DOMAINS, min_examples=20)
    shared = learned(target, tmp_path / "shared", log, None)
    routed = learned(target, tmp_path / "routed", log, settings)

    # Equal cost: the same requests, and each route makes half of the updates of the shared drafter.
    spent = [[row["positions"] for row in metrics(tmp_path / name)] for name in ("shared", "routed")]
    assert len(spent[0]) == len(spent[1]) == len(DOMAINS) * UPDATES
    assert sum(spent[0]) == sum(spent[1])
    assert [len({row["route"] for row in metrics(tmp_path / name)}) for name in ("shared", "routed")] == [1, 2]

    # Prompts without a tag. A serving stack has the file of the router and the links to the published versions.
    draws = torch.Generator().manual_seed(9)
    prompts = [opened(number % 2, draws) for number in range(64)]
    router = Router.load(tmp_path / "routed" / "drafters" / "router.safetensors", settings)
    routes = [router.route_of_prompt(prompt) for prompt in prompts]
    assert sum(route == DOMAINS[number % 2] for number, route in enumerate(routes)) >= 61
    published = {name: route.versions.path(route.versions.current()) for name, route in routed.routes.items()}
    one = shared.routes[""].versions
    by_shared = counted(target, [one.path(one.current())] * len(prompts), prompts)
    by_routed = counted(target, [published[route] for route in routes], prompts)
    assert gain(by_routed, by_shared).low > 0
    # With every request on the wrong route, the two drafters are worse than the shared one.
    other = dict(zip(DOMAINS, reversed(DOMAINS), strict=True))
    by_wrong = counted(target, [published[other[route]] for route in routes], prompts)
    assert gain(by_wrong, by_shared).high < 0
