"""The model card: what the drafter yields, how to use it, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.drafters import drafters
from drafttrain.eval.table import interval, number


def model_card(name: str, result: Mapping[str, Any], *, drafter: str, recipe: str, command: str) -> str:
    """Return README.md of a drafter folder.

    Args:
        result: What `evaluate` returned.
        drafter: Name of the judged drafter in it.
        recipe: The resolved recipe.
    """
    rows = []
    lossy = " LOSSY" if result["exactness"] == "lossy" else ""
    for part in result["temperatures"]:
        figures = part["drafters"][drafter]
        rows.append(
            f"| {part['temperature']:g}{lossy} | {interval(figures['block_efficiency'])} | {interval(figures['alpha'])} "
            f"| {number(figures['draft_acceptance_rate'])} | {number(figures['mbsu'])} |"
        )
    parities = [
        p["drafters"][drafter]["parity"]["text"] for p in result["temperatures"] if "parity" in p["drafters"][drafter]
    ]
    target, made = result["target"], result["provenance"]
    length = ", ".join(f"{key} {value}" for key, value in result["settings"]["length"].items())
    parity_line = f"Greedy parity with the target: {parities[0]}." if parities else "Greedy parity was not measured."
    if lossy:
        rule = result["settings"]["rule"]["kind"]
        parity_line = f"**LOSSY**: measured with the acceptance rule `{rule}`, whose output is not the target's own."
    nl = "\n"
    component: Any = drafters.entry(result["drafters"][drafter]["kind"]).component
    serving: str = component.serving
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model]
---
# {name}

A drafter for speculative decoding with the target `{target["name"]}` (fingerprint `{target["fingerprint"]}`). It proposes
tokens; the target decides. It is no model to talk to by itself.

| temperature | block efficiency | alpha | draft acceptance rate | MBSU |
|---|---|---|---|---|
{nl.join(rows)}

{result["num_prompts"]} prompts, {length}, 95 % intervals over prompts; measured on these files with the embedded evaluator.
{parity_line}

## Use

{serving}

## Where it comes from

`{command}`, commit `{made["commit"] or "unknown"}`, {made["date"]}, {made["machine"]["processor"]}.

```yaml
{recipe.rstrip()}
```
"""
