"""The model card: what the drafter yields, how to use it, where it comes from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.drafters import drafters
from drafttrain.eval.interval import number, p_value
from drafttrain.eval.result import Result
from drafttrain.eval.table import (
    CARRIES_OVER,
    CARRIES_OVER_CAPTION,
    THIS_MACHINE_CAPTION,
    in_words,
)
from drafttrain.export.markdown import block, code, plain
from drafttrain.serving.engines import ServingEngine, Use, engine_of, engines

USE = "## Use\n\n"
SERVED = "## In serving engines"
ORIGIN = "## Where it comes from"

WORDS = (
    "TARGET is the target's folder or hub id, DRAFTER the folder that the training exported (format `hf`), DRAFTER.FORMAT what\n"
    "`drafttrain export DRAFTER --to FORMAT` writes beside it."
)
"""What the words in the commands mean."""

NUM_DRAFT_TOKENS = 5
"""In a command, where the evaluation has no fixed length."""


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
            f"| {temperature} | {figures.block_efficiency.text()} | {figures.alpha.text()} "
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
    length = in_words(result.settings["length"])
    if result.lossy:
        rule = result.settings["rule"]["kind"]
        parity_line = f"**LOSSY**: measured with the acceptance rule `{rule}`, whose output is not the target's own."
    nl = "\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model]
---
# {plain(name)}

A drafter for speculative decoding with the target {code(target.name)} (fingerprint {code(target.fingerprint)}). It proposes
tokens; the target decides. It is no model to talk to by itself.

{CARRIES_OVER}: {CARRIES_OVER_CAPTION}.

| temperature | block efficiency | alpha | draft acceptance rate | MBSU |
|---|---|---|---|---|
{nl.join(rows)}

{result.num_prompts} prompts, {length}, 95 % intervals over prompts; measured on these files with the embedded evaluator.
{parity_line}

On {made.machine.processor}: {THIS_MACHINE_CAPTION}.

| temperature | tokens/s | speed-up | baseline | prompts |
|---|---|---|---|---|
{nl.join(times)}

{USE}{_use(result, drafter)}

{ORIGIN}

{code(command)}, commit `{made.commit or "unknown"}`, {made.date}, {made.machine.processor}.

{block(recipe, "yaml")}
"""


def _use(result: Result, drafter: str) -> str:
    """Return the command of every engine that runs this kind of drafter, and what else there is to know."""
    about, length = result.drafters[drafter], result.settings["length"]
    kind, wanted = about.kind, about.about.draft if about.about else "sampled"
    num_draft_tokens = length.get("depth") or length.get("num_draft_tokens") or NUM_DRAFT_TOKENS
    num_draft_tokens = min(num_draft_tokens, about.deepest or num_draft_tokens)
    blocks = [WORDS]
    for engine in map(engine_of, engines.names()):
        if kind in engine.methods:
            use = Use(_folder(engine), kind, num_draft_tokens, engine.draft(kind, wanted))
            # Without a word between them, two blocks of code would be one.
            blocks += [f"{engine.name}:", textwrap.indent(engine.command("TARGET", use), "    ")]
    component: Any = drafters.entry(kind).component
    return "\n\n".join([*blocks, component.serving])


def _folder(engine: ServingEngine) -> str:
    """Return the word for what an engine loads: `WORDS` says what it means."""
    return "DRAFTER" if "hf" in engine.formats else f"DRAFTER.{engine.formats[0]}"


def in_format(card: str, format: str) -> str:
    """Return the card of a folder that was written in a format, with a word on which of the folders in its commands it is."""
    before, use, after = card.partition(USE)
    return f"{before}{use}This folder is DRAFTER.{format}. {after}" if use else card


def with_engines(card: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return a card with what serving engines did beside the evaluator; what an earlier one said of them is replaced.

    Args:
        comparisons: What `Comparison.json` returned, each with its `format`.
    """
    card = re.sub(rf"{SERVED}\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    section = "\n\n".join([SERVED, *(_beside(one) for one in comparisons)]) + "\n\n"
    before, origin, after = card.partition(ORIGIN)
    return before.rstrip() + "\n\n" + section + origin + after


def _beside(one: Mapping[str, Any]) -> str:
    """Return a comparison: the verdict, and both columns."""
    sides = ("engine", "evaluator")
    asked = {"temperature 0": one["greedy"]}
    sampled = "It is not asked at temperature above 0."
    if part := one["sampled"]:
        temperature = f"temperature {part['temperature']:g}"
        asked[temperature] = part
        sampled = (
            f"At {temperature}, drafts {one['draft']}, acceptance is the same with {p_value(part['p_value'])}, and so is the "
            f"likelihood of the text, with {p_value(part['text_p_value'])}."
        )
    rows = []
    for label, part in asked.items():
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
        *(f"The engine's build was mended to be asked: {what}." for what in one["repaired"]),
        *(f"Problem: {plain(problem)}" for problem in one["problems"]),
        "",
        f"| | {one['engine']} | embedded evaluator |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)
