"""The model card: figures of the drafter, how to use it, where it comes from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.drafters import drafters
from drafttrain.eval.interval import interval_of, number, p_value
from drafttrain.eval.quality import tuning_in_words
from drafttrain.eval.result import Result
from drafttrain.eval.table import (
    CARRIES_OVER,
    CARRIES_OVER_CAPTION,
    THIS_MACHINE_CAPTION,
    alpha_cell,
    drafting_in_words,
    slice_rows,
)
from drafttrain.export.markdown import block, code, plain
from drafttrain.serving.engines import ServingEngine, Use, engine_of, engines
from drafttrain.serving.engines.transformers import with_own_tokenizer

USE = "## Use\n\n"
SERVED = "## In serving engines"
ORIGIN = "## Where it comes from"

PLACEHOLDERS = (
    "TARGET is the target's folder or hub id, DRAFTER the folder that training exported (format `hf`), DRAFTER.FORMAT the folder\n"
    "that `drafttrain export DRAFTER --to FORMAT` writes beside it."
)
"""Explains the placeholders in the commands."""

NUM_DRAFT_TOKENS = 5
"""In a command, if the evaluation has no fixed length."""


def model_card(name: str, result: Result, *, drafter: str, recipe: str, command: str) -> str:
    """Return README.md of a drafter folder.

    Args:
        result: What `evaluate` returned.
        drafter: Name of the judged drafter in it.
        recipe: The resolved recipe.
    """
    rows, times = [], []
    lossy = " LOSSY" if result.lossy else ""
    for part in result.temperatures:
        figures, temperature = part.drafters[drafter], f"{part.temperature:g}{lossy}"
        rows.append(
            f"| {temperature} | {figures.block_efficiency.text()} | {alpha_cell(figures)} "
            f"| {number(figures.draft_acceptance_rate)} | {number(figures.mbsu)} |"
        )
        speed = figures.speedup
        times.append(
            f"| {temperature} | {figures.tokens_per_second.value:.0f} | {speed.text()} | {plain(speed.baseline)} "
            f"| {speed.num_prompts} |"
        )
    parities = [part.drafters[drafter].parity for part in result.temperatures]
    found = next((parity for parity in parities if parity is not None), None)
    parity_line = f"Greedy parity with the target: {found.text}." if found else "Greedy parity was not measured."
    target, made = result.target, result.provenance
    length = drafting_in_words(result)
    if result.lossy:
        rule = result.settings["rule"]["kind"]
        parity_line = f"**LOSSY**: measured with the acceptance rule `{rule}`, which changes the target's output."
    nl = "\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model]
---
# {plain(name)}

A drafter for speculative decoding with the target {code(target.name)} (fingerprint {code(target.fingerprint)}). It proposes
tokens; the target decides. It is not a chat model by itself.

{CARRIES_OVER}: {CARRIES_OVER_CAPTION}.

| temperature | block efficiency | alpha | draft acceptance rate | MBSU |
|---|---|---|---|---|
{nl.join(rows)}

{result.num_prompts} prompts, {length}, 95 % intervals over prompts; measured on these files with the embedded evaluator.
{parity_line}
{_target_modified(result, drafter)}{_by_domain(result, drafter)}
On {made.machine.processor}: {THIS_MACHINE_CAPTION}.

| temperature | tokens/s | speed-up | baseline | prompts |
|---|---|---|---|---|
{nl.join(times)}

{_beside(result, drafter)}{USE}{_use(result, drafter)}

{ORIGIN}

{code(command)}, commit `{made.commit or "unknown"}`, {made.date}, {made.machine.processor}.

{block(recipe, "yaml")}
"""


def _target_modified(result: Result, drafter: str) -> str:
    """Return that the target was tuned, and what that costs; empty where it was not."""
    about = result.drafters[drafter]
    if about.target_modified is None:
        return ""
    lines = [
        f"\n**target_modified**: it drafts for {code(about.target)}, which is {code(result.target.name)} with `{about.target_modified}/` of "
        "this folder. Parity and speed-up are those of that target. It is another model:\n"
    ]
    for part in result.temperatures:
        if (figures := (part.tuned or {}).get(drafter)) is not None:
            lines += [f"- temperature {part.temperature:g}: {plain(one)}" for one in tuning_in_words(figures)]
    return "".join(f"{line}\n" for line in lines)


def _by_domain(result: Result, drafter: str) -> str:
    """Return what the outputs show beyond the totals: the share of the draft vocabulary, and a table by domain."""
    greedy = result.greedy_or_first
    lines = []
    if (share := greedy.drafters[drafter].draft_vocabulary_share) is not None:
        lines += [f"The draft vocabulary holds {share:.2%} of the tokens of these outputs."]
    place = list(greedy.drafters).index(drafter)
    rows = [f"| {plain(row[0])} | {row[1]} | {row[2 + place]} |" for row in slice_rows(greedy, "domain")]
    if rows:
        lines += [
            "",
            f"| domain, temperature {greedy.temperature:g} | prompts | block efficiency |",
            "|---|---|---|",
            *rows,
        ]
    return "".join(f"{line}\n" for line in lines)


def _beside(result: Result, drafter: str) -> str:
    """Return a table of the training-free proposers at the same draft length; empty where none was evaluated."""
    rows = []
    for part in result.temperatures:
        length = part.drafters[drafter].length
        for name, figures in part.drafters.items():
            if figures.proposer is not None and figures.length == length:
                compared = part.comparisons[f"{drafter} - {name}"]
                rows.append(
                    f"| {part.temperature:g} | {plain(name)} | {figures.block_efficiency.text()} | {figures.speedup.text()} "
                    f"| {compared.block_efficiency.text()} ({p_value(compared.p_value)}) |"
                )
    lines = [
        "Beside it, on the same prompts at the same draft length, proposers that need no training:",
        "",
        "| temperature | proposer | block efficiency | speed-up | block efficiency of this drafter, minus it |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "".join(f"{line}\n" for line in lines) if rows else ""


def _use(result: Result, drafter: str) -> str:
    """Return the command of every engine that runs this kind of drafter, and the notes of the kind."""
    about, length = result.drafters[drafter], result.settings["length"]
    kind, wanted = about.kind, about.about.draft if about.about else "sampled"
    num_draft_tokens = length.get("depth") or length.get("num_draft_tokens") or NUM_DRAFT_TOKENS
    num_draft_tokens = min(num_draft_tokens, about.deepest or num_draft_tokens)
    if about.about is not None and about.about.own_tokenizer:
        use = Use("DRAFTER", kind, num_draft_tokens, wanted)
        return "\n\n".join(
            [
                "TARGET is the target's folder or hub id, DRAFTER this folder, whose tokenizer is another one. transformers:",
                textwrap.indent(with_own_tokenizer("TARGET", use), "    "),
                "No serving engine here passes text between two tokenizers: elsewhere decode with `drafttrain eval DRAFTER`.",
            ]
        )
    blocks = [PLACEHOLDERS]
    for engine in map(engine_of, engines.names()):
        if kind in engine.methods:
            use = Use(_folder(engine, kind), kind, num_draft_tokens, engine.draft(kind, wanted))
            # Without text between them, two blocks of code would be one.
            blocks += [f"{engine.name}:", textwrap.indent(engine.command("TARGET", use), "    ")]
    component: Any = drafters.entry(kind).component
    return "\n\n".join([*blocks, component.serving])


def _folder(engine: ServingEngine, kind: str) -> str:
    """Return the placeholder for the folder that an engine loads; `PLACEHOLDERS` explains it."""
    formats = engine.formats_for(kind)
    return "DRAFTER" if "hf" in formats else f"DRAFTER.{formats[0]}"


def in_format(card: str, format: str) -> str:
    """Return the card for a folder in another format. It names the placeholder that stands for the folder in the commands."""
    before, use, after = card.partition(USE)
    return f"{before}{use}This folder is DRAFTER.{format}. {after}" if use else card


def with_engines(card: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return a card with the comparisons of serving engines and evaluator, in place of earlier ones.

    Args:
        comparisons: What `Comparison.json` returned, each with its `format`.
    """
    card = re.sub(rf"{SERVED}\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    section = "\n\n".join([SERVED, *(_comparison(one) for one in comparisons)]) + "\n\n"
    before, origin, after = card.partition(ORIGIN)
    return before.rstrip() + "\n\n" + section + origin + after


def _comparison(one: Mapping[str, Any]) -> str:
    """Return the section of a comparison: the verdict and the counters of both sides."""
    sides = ("engine", "evaluator")
    runs = {"temperature 0": one["greedy"]}
    sampled = "It was not run at temperature above 0."
    if part := one["sampled"]:
        temperature = f"temperature {part['temperature']:g}"
        runs[temperature] = part
        sampled = (
            f"At {temperature}, drafts {one['draft']}, acceptance does not differ ({p_value(part['p_value'])}), nor does "
            f"the likelihood of the text ({p_value(part['text_p_value'])})."
        )
    rows = []
    for label, part in runs.items():
        for name, key in (("drafts", "num_drafts"), ("draft tokens", "num_draft_tokens"), ("accepted", "num_accepted")):
            rows.append([f"{label}: {name}", *(f"{part[side][key]:,}" for side in sides)])
        rows.append(
            [f"{label}: accepted by position", *(", ".join(map(str, part[side]["accepted_at"])) for side in sides)]
        )
        rows.append([f"{label}: block efficiency", *(number(part[side]["block_efficiency"], 3) for side in sides)])
    lines = [
        f"**{one['engine']} {one['version']}, format `{one['format']}`: {one['verdict']}.** {one['num_prompts']} prompts, "
        f"{one['max_new_tokens']} tokens each, {one['num_draft_tokens']} draft tokens, {one['dtype']}; with the drafter and without: "
        f"{one['lossless']['text']}. {sampled}",
        *(f"The engine's build was patched for this run: {what}." for what in one["repaired"]),
        *(f"Problem: {plain(problem)}" for problem in one["problems"]),
        "",
        f"| | {one['engine']} | embedded evaluator |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in [*rows, *_speed_rows(one.get("speed"))]),
        *_speed_lines(one.get("speed")),
    ]
    return "\n".join(lines)


def _speed_rows(speed: Mapping[str, Any] | None) -> list[list[str]]:
    """Return the rows with the speeds of both sides; none if they were not measured."""
    if speed is None:
        return []
    sides = [speed[side] for side in ("engine", "evaluator")]
    return [
        ["greedy tokens/s without the drafter", *(number(side["without_drafter"], 1) for side in sides)],
        ["greedy tokens/s with the drafter", *(number(side["with_drafter"], 1) for side in sides)],
        ["speed-up", *(interval_of(side["speedup"]).text() for side in sides)],
        ["threads", *(str(side["num_threads"]) for side in sides)],
    ]


def _speed_lines(speed: Mapping[str, Any] | None) -> list[str]:
    """Return how the speeds were measured."""
    if speed is None:
        return []
    return [
        "",
        f"Speeds: {speed['num_prompts']} prompts, one at a time, each up to the end of its text; the engine by its own clock, in "
        f"processes with the drafter and without in turns ({speed['num_pairs']} of each). Its speed-up after the prompt is "
        f"{interval_of(speed['after_prompt']).text()}, in CPU seconds {interval_of(speed['of_cpu']).text()}. "
        f"With the drafter and without it wrote: {speed['texts']['text']}.",
    ]
