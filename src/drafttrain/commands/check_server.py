"""A live server's counters over a prompt set, beside what the drafter's evaluation promised."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import About, read_about
from drafttrain.config.load import load_sections
from drafttrain.core.console import say, table
from drafttrain.core.errors import DataError, GateError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.provenance import provenance
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.openai_client import Completions
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
from drafttrain.target_model.folders import BUILTIN, resolve_folder
from drafttrain.target_model.tokenizer import load_target_tokenizer

SERVER = "server.json"
TAKEN_OVER = ("prompts", "prompt_tokens", "max_new_tokens", "top_p", "top_k")
"""Settings of the evaluation that hold for the server too, where they are not overridden."""


@dataclass(frozen=True)
class LiveQuestion:
    """Which server is asked, and how."""

    url: str
    engine: str
    model: str | None
    """As the server calls it; None: the one that is the drafter's target."""
    api_key_variable: str | None
    """Environment variable that holds the key; None: none is sent."""


def evaluate_server(
    drafter: Path | None,
    question: LiveQuestion,
    overrides: Sequence[str],
    *,
    target: str | None,
    out: Path | None,
    require: bool,
) -> None:
    """Let a live server decode prompts and set its counters beside what the drafter's evaluation promised.

    Args:
        drafter: The drafter folder that is served, or its run folder; None: nothing is known of a promise.
        overrides: Of the sections target and eval.
        target: Its model, whose tokenizer reads the prompts; None: the one that the drafter was made for.
        out: Folder for server.json; None: the drafter's.

    Raises:
        GateError: With `require`, where the promise is not kept or there is none.
    """
    quiet_libraries()
    names = _counters_of(question.engine)
    folder, about, result = _drafter(drafter) if drafter else (None, None, None)
    of_target, settings = load_sections(["target", "eval"], [*_taken_over(result), *overrides])
    if target is None and not any(word.startswith("target.model=") for word in overrides):
        if about is None:
            raise RecipeError("arguments", ["which target is served is not known: give DRAFTER, or --target"])
        target = about.target
    of_target = replace(of_target, model=target or of_target.model)
    if not any(word.startswith("eval.temperatures") for word in overrides):
        settings.temperatures = [0.0]
    prompts = _prompts(of_target, settings, result)
    figures, model = asyncio.run(_served(question, names, of_target.model, about, prompts, settings, result))
    rows = [_judged(one, settings, result) for one in figures]
    for row in rows:
        _show(row, title=f"{question.engine} at {question.url}, model {model}")
    told = {
        "server": question.url,
        "engine": question.engine,
        "model": model,
        "target": of_target.model,
        "drafter": str(drafter) if drafter else None,
        "temperatures": rows,
        "provenance": provenance(),
    }
    _write(told, out or folder)
    failed = [
        f"temperature {row['temperature']:g}: {row['why']}" for row in rows if row["verdict"] in ("below", "none")
    ]
    if require and failed:
        raise GateError("\n  ".join(["the server does not do what was promised:", *failed]))


def _counters_of(engine: str) -> CounterNames:
    able = [name for name in engines.names() if engine_of(name).counters is not None]
    found = engine_of(engine).counters if engine in able else None
    if found is None:
        why = "its server counts no draft tokens" if engine in (*engines.names(), "sglang") else "not known here"
        raise RecipeError(
            "arguments", [f"--engine {engine}: {why}. Engines whose counters are read: {', '.join(able)}"]
        )
    return found


def _drafter(given: Path) -> tuple[Path, About | None, Result]:
    """Return the folder that was given, and what it or the drafter of this run says of itself and of its evaluation."""
    place = exported_in(given)
    return given, read_about(place), read_evaluation(place)


def _taken_over(result: Result | None) -> list[str]:
    if result is None:
        return []
    return [f"eval.{name}={json.dumps(result.settings[name])}" for name in TAKEN_OVER]


def _prompts(of_target: Any, settings: EvalSettings, result: Result | None) -> list[Prompt]:
    """Return the prompts: where they are of the evaluation's own set, those that it used."""
    prompts = read_prompts(settings.prompts, load_target_tokenizer(of_target), prompt_tokens=settings.prompt_tokens)
    if result is not None and all(getattr(settings, name) == result.settings[name] for name in TAKEN_OVER[:2]):
        used = _counted(result, temperature=None)
        prompts = [prompt for prompt in prompts if prompt.id in used]
    return prompts[: settings.num_prompts]


def _counted(result: Result | None, *, temperature: float | None) -> dict[str, int]:
    """Return how many tokens of each prompt the evaluation counted: up to where a text repeats itself; None: at any temperature."""
    if result is None:
        return {}
    parts = [part for part in result.temperatures if temperature in (None, part.temperature)]
    figures = [next(iter(part.drafters.values())) for part in parts]
    return {one.id: one.num_tokens for of_part in figures[:1] for one in of_part.prompts}


async def _served(
    question: LiveQuestion,
    names: CounterNames,
    target: str,
    about: About | None,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    result: Result | None,
) -> tuple[list[LiveFigures], str]:
    if target.startswith(BUILTIN):
        target = str(resolve_folder(target))
    base_url = question.url.rstrip("/").removesuffix("/v1") + "/v1"
    async with Completions(base_url, _key(question), PATIENCE) as completions:
        cards = await completions.models()
        if question.model is None:
            fingerprint = about.target_fingerprint if about else ""
            model = served_model(cards, target, fingerprint=fingerprint, where=base_url)
        else:
            model = question.model
            await completions.check_model(model)
        server = LiveServer(completions, names, model=model)
        await server.counters()
        figures = []
        for temperature in settings.temperatures:
            greedy = temperature == 0
            sampling = Sampling() if greedy else Sampling(temperature, settings.top_p, settings.top_k)
            # A greedy text is the evaluation's own: the server is asked for as much of it as was counted there.
            counted = _counted(result, temperature=temperature) if greedy else {}
            most = settings.max_new_tokens
            lengths = {prompt.id: max(2, min(most, counted.get(prompt.id, most))) for prompt in prompts}
            figures.append(await server.figures(prompts, sampling, max_new_tokens=lengths))
    return figures, model


def _key(question: LiveQuestion) -> str | None:
    variable = question.api_key_variable
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DataError(f"--api-key-variable: the environment has no {variable}")
    return key


def _judged(figures: LiveFigures, settings: EvalSettings, result: Result | None) -> dict[str, Any]:
    """Return what server.json holds of a temperature: figures, promise, and whether it is kept."""
    served = figures.block_efficiency()
    same_prompts = {window.id for window in figures.windows} == set(_counted(result, temperature=figures.temperature))
    told = figures.json() | {"block_efficiency": served.json(), "same_prompts": same_prompts}
    length = figures.num_draft_tokens
    promise = promise_of(result, temperature=figures.temperature, num_draft_tokens=length) if result else None
    if promise is None:
        why = f"no evaluation of chains of {length} draft tokens at this temperature is known"
        return told | {"promise": None, "verdict": "none", "why": why}
    # On other prompts, or fewer of them, the served figure is itself known up to its interval only.
    between = (served.value, served.value) if same_prompts else (served.low, served.high)
    verdict = promise.verdict(*(served.value if bound != bound else bound for bound in between))
    words = {
        "kept": "the promise is kept",
        "above": "more than was promised",
        "below": "the promise is not kept",
    }[verdict]
    on = "on its prompts" if same_prompts else "on other prompts than the evaluation's, or not all of them"
    why = (
        f"{words}: block efficiency {served.text(3)} served, {promise.block_efficiency.text(3)} promised "
        f"({promise.measured}), {on}; tolerance {TOLERANCE:.0%}"
    )
    return told | {"promise": promise.json(), "verdict": verdict, "why": why}


def _show(row: Mapping[str, Any], *, title: str) -> None:
    promise = row["promise"] or {}
    promised = interval_of(promise).text(3) if promise else "n/a"
    rows = [["block efficiency", interval_of(row["block_efficiency"]).text(3), promised]]
    served = row["acceptance_by_position"]
    positions = promise.get("acceptance_by_position") or [None] * len(served)
    for i, shares in enumerate(zip_longest(served, positions[: len(served)])):
        rows.append([f"kept at position {i + 1}", *(number(share, 3) for share in shares)])
    for name, label in (("num_drafts", "drafts"), ("num_draft_tokens", "draft tokens"), ("num_accepted", "accepted")):
        rows.append([label, f"{row['counters'][name]:,}", ""])
    title += f": {row['num_prompts']} prompts, temperature {row['temperature']:g}"
    title += f", draft tokens a round: {row['num_draft_tokens']}"
    table(rows, columns=["", "served", "promised"], title=title)
    if row["num_prompts_shared"]:
        say(
            f"{row['num_prompts_shared']} further prompts are left out: other requests were served meanwhile, and the counters "
            "rose by theirs too"
        )
    say(row["why"])


def _write(told: Mapping[str, Any], out: Path | None) -> None:
    if out is None:
        say(f"{SERVER}: not written, --out DIR says where to")
        return
    write_json(out / SERVER, told)
    say(f"written: {out / SERVER}")
