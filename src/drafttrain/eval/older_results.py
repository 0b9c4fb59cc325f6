"""What eval.json of earlier versions did not store."""

from __future__ import annotations

from typing import Any

WITH_NEAR_TIES = 4
"""The first version that counted them."""


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
            if "domains" in figures:
                figures["slices"] = _slices(figures.pop("domains"))
            if content["format"] < WITH_NEAR_TIES and (parity := figures.get("parity")) is not None:
                _complete_parity(parity)
    return content


def _slices(domains: dict[str, Any]) -> dict[str, Any]:
    """Return the one axis that there was; its first version had no intervals."""
    unknown = {"low": None, "high": None, "num_prompts": 0}
    found = {name: one if isinstance(one, dict) else {"value": one, **unknown} for name, one in domains.items()}
    return {"domain": found} if found else {}


def _complete_parity(parity: dict[str, Any]) -> None:
    """Add which differences of greedy outputs are near ties."""
    near = sum(one["near_tie"] for one in parity["divergences"])
    parity |= {"num_near_ties": near, "num_unexplained": len(parity["divergences"]) - near}
    for one in parity["divergences"]:
        one["rounding"] = None
