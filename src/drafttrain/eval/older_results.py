"""What eval.json of earlier versions did not store."""

from __future__ import annotations

from typing import Any

WITH_INTERVALS_OF_DOMAINS = 4
"""The first version that stored them."""


def completed(content: dict[str, Any]) -> dict[str, Any]:
    """Add what evaluations of earlier versions did not store.

    They had one length and one rule, and domains without intervals. Baselines whose texts were not compared are left out.
    """
    content.get("target", {}).setdefault("dtype", "")
    for part in content["temperatures"]:
        if "transformers_generate_equal" not in part["plain"].get("same_prompts", {}):
            part["plain"].pop("same_prompts", None)
        for figures in part["drafters"].values():
            figures.setdefault("length", content["settings"]["length"])
            figures.setdefault("exactness", content["exactness"])
            if content["format"] < WITH_INTERVALS_OF_DOMAINS:
                _complete_older(figures)
            if "domains" in figures:
                domains = figures.pop("domains")
                figures["slices"] = {"domain": domains} if domains else {}
    return content


def _complete_older(figures: dict[str, Any]) -> None:
    """Add intervals of domains, and which differences of greedy outputs are near ties."""
    unknown = {"low": None, "high": None, "num_prompts": 0}
    figures["domains"] = {name: {"value": value, **unknown} for name, value in figures["domains"].items()}
    if (parity := figures.get("parity")) is not None:
        near = sum(one["near_tie"] for one in parity["divergences"])
        parity |= {"num_near_ties": near, "num_unexplained": len(parity["divergences"]) - near}
        for one in parity["divergences"]:
            one["rounding"] = None
