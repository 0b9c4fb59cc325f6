"""Advice in tables and pictures, on the terminal, in advice.png and in report.html."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from drafttrain.core.foreign import read_json
from drafttrain.eval.advice import Advice, Predicted
from drafttrain.eval.length import length_policies
from drafttrain.eval.page import label
from drafttrain.eval.result import Result
from drafttrain.eval.settings import length_label
from drafttrain.eval.typed_json import from_json

BEST_COLUMNS = ["device", "context", "batch", "speed-up", "best length", "tokens a target call", "tokens/s", "GB"]
END_COLUMNS = ["device", "context", "drafting stops paying at batch"]
PICTURE_CAPTION = (
    "By batch, for every draft length. Solid: its acceptance was decoded; dashed: computed by replay; hollow: it does not fit. "
    "Diamonds, beside the shortest context: measured by the evaluation, on its own texts. Dotted: plain decoding"
)
HEIGHT = 3.4
"""Of a row of the picture, in inches."""


def stored_advice(path: Path, result: Result) -> Advice | None:
    """Return the advice of a file; None: there is none, or it was made from another evaluation."""
    if not path.exists():
        return None
    content = read_json(path)
    return from_json(Advice, content) if content.get("evaluated") == result.provenance.date else None


def heading(advice: Advice) -> str:
    """Return what the table of the best lengths shows."""
    return f"{advice.drafter} drafts for {advice.target}, temperature {advice.temperature:g}: predicted, by length the best"


def best_rows(advice: Advice) -> list[list[str]]:
    """Return the rows of the table of the best lengths."""
    return [
        [
            one.device,
            f"{one.context:,}",
            f"{one.batch:,}",
            one.speedup.text(),
            "none pays" if one.speedup.value <= 1 else _words(one.length),
            one.block_efficiency.text(),
            f"{one.tokens_per_second:,.0f}",
            f"{one.gigabytes:.3g}" if one.fits else f"{one.gigabytes:.3g}: does not fit",
        ]
        for one in advice.best()
    ]


def end_rows(advice: Advice) -> list[list[str]]:
    """Return the rows of the table of the batches at which drafting stops paying."""
    return [
        [end.device, f"{end.context:,}", "none found" if end.batch is None else f"{end.batch:,}"] for end in advice.ends
    ]


def grid(advice: Advice) -> dict[str, int]:
    """Return the size of the picture: a row for each device, a column for each context."""
    return {
        "rows": len({one.device for one in advice.surface}),
        "columns": len({one.context for one in advice.surface}),
    }


def draw(axes: Sequence[Any], advice: Advice) -> None:
    """Draw the speed-up of every length against the batch, in the order of `grid`."""
    devices = dict.fromkeys(one.device for one in advice.surface)
    contexts = dict.fromkeys(one.context for one in advice.surface)
    batches = sorted({one.batch for one in advice.surface} | {one.batch for one in advice.speeds})
    colors = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(map(_words, _lengths(advice))))}
    shown: dict[str, Any] = {}
    for ax, (device, context) in zip(axes, product(devices, contexts), strict=True):
        lines: dict[str, list[Predicted]] = defaultdict(list)
        for one in advice.surface:
            if (one.device, one.context) == (device, context):
                lines[_words(one.length)].append(one)
        for name, line in lines.items():
            line.sort(key=lambda one: one.batch)
            color, style = colors[name], "--" if line[0].from_replay else "-"
            places, values = [one.batch for one in line], [one.speedup.value for one in line]
            (shown[label(name)],) = ax.plot(places, values, style, color=color, lw=1.2)
            for one in line:
                ax.plot(one.batch, one.speedup.value, "o", ms=4, mec=color, mfc=color if one.fits else "none")
        for found in advice.speeds:
            if (found.device, min(contexts)) == (device, context):
                (shown["measured"],) = ax.plot(
                    found.batch, found.speedup.value, "D", ms=7, mec="#222", mfc=colors[_words(found.length)]
                )
        ax.axhline(1.0, color="#888", lw=1, ls=":")
        ax.set(xscale="log", xlabel="batch", ylabel="predicted speed-up", title=f"{label(device)}, context {context:,}")
        ax.set_xticks(batches, [f"{batch:,}" for batch in batches])
        ax.minorticks_off()
    axes[0].figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _lengths(advice: Advice) -> list[Mapping[str, Any]]:
    return [*(one.length for one in advice.surface), *(one.length for one in advice.speeds)]


def _words(length: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in length.items() if key != "kind"}
    return length_label(length_policies.entry(length["kind"]).settings(**settings))
