"""drafttrain check-server: a live server's speculation counters, compared with the drafter's evaluation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import About, read_about
from drafttrain.config.load import load_sections
from drafttrain.core.console import say, table
from drafttrain.core.errors import GateError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.provenance import provenance
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.openai_client import Completions, key_from
from drafttrain.eval.interval import interval_of, number
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Result
from drafttrain.eval.settings import EvalSettings
from drafttrain.pipeline.folder import exported_in
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.serving.draft_length import read_evaluation
from drafttrain.serving.engines import CounterNames, engine_of, engines
from drafttrain.serving.live_server import PATIENCE, LiveFigures, LiveServer, served_model
from drafttrain.serving.promise import TOLERANCE, promise_of
from drafttrain.target_model.folders import resolve_folder, stands_for_folder
from drafttrain.target_model.tokenizer import load_target_tokenizer

SERVER = "server.json"
TAKEN_OVER = ("prompts", "prompt_tokens", "max_new_tokens", "top_p", "top_k")
"""Settings of the evaluation that are used for the server too, unless they are overridden."""


@dataclass(frozen=True)
class ServerAccess:
    """The server to check, and how to send requests to it."""

    url: str
    engine: str
    model: str | None
    """The name that the server uses for the model; None: the model that is the drafter's target."""
    api_key_variable: str | None
    """Environment variable that holds the API key; None: no key is sent."""


def evaluate_server(
    drafter: Path | None,
    access: ServerAccess,
    overrides: Sequence[str],
    *,
    target: str | None,
    out: Path | None,
    require: bool,
) -> None:
    """Let a live server decode prompts, and compare its counters with the drafter's evaluation.

    Args:
        drafter: The served drafter folder, or its run folder; None: there is no evaluation to compare with.
        overrides: Overrides of the sections target and eval.
        target: The target, whose tokenizer reads the prompts; None: the drafter's own.
        out: Folder of server.json; None: the drafter's.

    Raises:
        GateError: With `require`, if the promise is not kept, or there is none.
    """
    quiet_libraries()
    names = _counters_of(access.engine)
    folder, about, result = _drafter(drafter) if drafter else (None, None, None)
    of_target, settings = load_sections(["target", "eval"], [*_taken_over(result), *overrides])
    if target is None and not any(word.startswith("target.model=") for word in overrides):
        if about is None:
            raise RecipeError("arguments", ["the served target is unknown: give DRAFTER or --target"])
        target = about.target
    of_target = replace(of_target, model=target or of_target.model)
    if not any(word.startswith("eval.temperatures") for word in overrides):
        settings.temperatures = [0.0]
    prompts = _prompts(of_target, settings, result)
    figures, model = asyncio.run(_served(access, names, of_target.model, about, prompts, settings, result))
    rows = [_judged(one, settings, result) for one in figures]
    for row in rows:
        _show(row, title=f"{access.engine} at {access.url}, model {model}")
    report = {
        "server": access.url,
        "engine": access.engine,
        "model": model,
        "target": of_target.model,
        "drafter": str(drafter) if drafter else None,
        "temperatures": rows,
        "provenance": provenance(),
    }
    _write(report, out or folder)
    failed = [
        f"temperature {row['temperature']:g}: {row['why']}" for row in rows if row["verdict"] in ("below", "none")
    ]
    if require and failed:
        raise GateError("\n  ".join(["the server does not keep the promise of the evaluation:", *failed]))


def _counters_of(engine: str) -> CounterNames:
    able = [name for name in engines.names() if engine_of(name).counters is not None]
    found = engine_of(engine).counters if engine in able else None
    if found is None:
        why = (
            "its server has no counters of draft tokens" if engine in (*engines.names(), "sglang") else "unknown engine"
        )
        raise RecipeError("arguments", [f"--engine {engine}: {why}. Engines with counters: {', '.join(able)}"])
    return found


def _drafter(given: Path) -> tuple[Path, About | None, Result]:
    """Return the given folder, with the description and the evaluation of its drafter."""
    place = exported_in(given)
    return given, read_about(place), read_evaluation(place)


def _taken_over(result: Result | None) -> list[str]:
    if result is None:
        return []
    return [f"eval.{name}={json.dumps(result.settings[name])}" for name in TAKEN_OVER]


def _prompts(of_target: Any, settings: EvalSettings, result: Result | None) -> list[Prompt]:
    """Return the prompts; if they are the evaluation's own set, only those that it used."""
    prompts = read_prompts(settings.prompts, load_target_tokenizer(of_target), prompt_tokens=settings.prompt_tokens)
    given = settings.as_dict()
    if result is not None and all(given[name] == result.settings[name] for name in TAKEN_OVER[:2]):
        used = _counted(result, temperature=None)
        prompts = [prompt for prompt in prompts if prompt.id in used]
    return prompts[: settings.num_prompts]


def _counted(result: Result | None, *, temperature: float | None) -> dict[str, int]:
    """Return how many tokens the evaluation counted for each prompt, up to a repetition; `temperature` None: at its first one."""
    if result is None:
        return {}
    parts = [part for part in result.temperatures if temperature in (None, part.temperature)]
    figures = [next(iter(part.drafters.values())) for part in parts]
    return {one.id: one.num_tokens for of_part in figures[:1] for one in of_part.prompts}


async def _served(
    access: ServerAccess,
    names: CounterNames,
    target: str,
    about: About | None,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    result: Result | None,
) -> tuple[list[LiveFigures], str]:
    if stands_for_folder(target):
        target = str(resolve_folder(target))
    key = key_from(access.api_key_variable, named_by="--api-key-variable")
    base_url = access.url.rstrip("/").removesuffix("/v1") + "/v1"
    async with Completions(base_url, key, PATIENCE) as completions:
        cards = await completions.models()
        if access.model is None:
            fingerprint = about.target_fingerprint if about else ""
            model = served_model(cards, target, fingerprint=fingerprint, where=base_url)
        else:
            model = access.model
            await completions.check_model(model)
        server = LiveServer(completions, names, model=model)
        await server.counters()
        figures = []
        for temperature in settings.temperatures:
            greedy = temperature == 0
            sampling = Sampling() if greedy else Sampling(temperature, settings.top_p, settings.top_k)
            # A greedy text is the same as in the evaluation, so the server decodes as many tokens as were counted there.
            counted = _counted(result, temperature=temperature) if greedy else {}
            most = settings.max_new_tokens
            lengths = {prompt.id: max(2, min(most, counted.get(prompt.id, most))) for prompt in prompts}
            figures.append(await server.figures(prompts, sampling, max_new_tokens=lengths))
    return figures, model


def _judged(figures: LiveFigures, settings: EvalSettings, result: Result | None) -> dict[str, Any]:
    """Return the entry of server.json for a temperature: served figures, promised figures, and the verdict."""
    served = figures.block_efficiency()
    same_prompts = {window.id for window in figures.windows} == set(_counted(result, temperature=figures.temperature))
    entry = figures.json() | {"block_efficiency": served.json(), "same_prompts": same_prompts}
    length = figures.num_draft_tokens
    promise = promise_of(result, temperature=figures.temperature, num_draft_tokens=length) if result else None
    if promise is None:
        why = f"there is no evaluation of chains of {length} draft tokens at this temperature"
        return entry | {"promise": None, "verdict": "none", "why": why}
    # On other prompts, or only some of them, the served figure has an interval of its own.
    between = (served.value, served.value) if same_prompts else (served.low, served.high)
    verdict = promise.verdict(*(served.value if bound != bound else bound for bound in between))
    words = {
        "kept": "the promise is kept",
        "above": "more than promised",
        "below": "the promise is not kept",
    }[verdict]
    on = "on the evaluation's prompts" if same_prompts else "on other prompts, or only some of the evaluation's"
    why = (
        f"{words}: block efficiency {served.text(3)} served, {promise.block_efficiency.text(3)} promised "
        f"({promise.measured}), {on}; tolerance {TOLERANCE:.0%}"
    )
    return entry | {"promise": promise.json(), "verdict": verdict, "why": why}


def _show(row: Mapping[str, Any], *, title: str) -> None:
    promise = row["promise"] or {}
    promised = interval_of(promise).text(3) if promise else "n/a"
    rows = [["block efficiency", interval_of(row["block_efficiency"]).text(3), promised]]
    served = row["acceptance_by_position"]
    positions = promise.get("acceptance_by_position") or [None] * len(served)
    for i, shares in enumerate(zip_longest(served, positions[: len(served)])):
        rows.append([f"accepted at position {i + 1}", *(number(share, 3) for share in shares)])
    for name, label in (("num_drafts", "drafts"), ("num_draft_tokens", "draft tokens"), ("num_accepted", "accepted")):
        rows.append([label, f"{row['counters'][name]:,}", ""])
    title += f": {row['num_prompts']} prompts, temperature {row['temperature']:g}"
    title += f", draft tokens a round: {row['num_draft_tokens']}"
    table(rows, columns=["", "served", "promised"], title=title)
    if row["num_prompts_shared"]:
        say(
            f"{row['num_prompts_shared']} more prompts are not counted: the server answered other requests meanwhile, and its "
            "counters include those"
        )
    say(row["why"])


def _write(report: Mapping[str, Any], out: Path | None) -> None:
    if out is None:
        say(f"{SERVER}: not written: give --out DIR")
        return
    write_json(out / SERVER, report)
    say(f"written: {out / SERVER}")
