"""Parts of an HTML page that show names and texts from outside as plain text: template, pictures, labels."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drafttrain.core.files import written_beside
from drafttrain.core.printable import printable

LABEL_CHARACTERS = 60


def page(template: str) -> Any:
    """Return a template that inserts every value as text, never as HTML."""
    import jinja2

    def finalize(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    return jinja2.Environment(autoescape=True, finalize=finalize).from_string(template)


def label(text: str) -> str:
    """Return a name as a label of a picture: not as mathematics, visible in the legend, and not too long."""
    shown = printable(text)
    if len(shown) > LABEL_CHARACTERS:
        shown = shown[: LABEL_CHARACTERS - 3] + "..."
    # matplotlib reads text between two dollars as mathematics, and hides labels that begin with _ from the legend.
    return (" " + shown if shown.startswith("_") else shown).replace("$", r"\$")


def picture(draw: Callable[[Any], None], *, columns: int, rows: int = 1, height: float = 3.2) -> str:
    """Return a drawing as an SVG data URL.

    Args:
        height: Of a row, in inches.
    """
    buffer = io.BytesIO()
    _save(
        _figure(draw, columns=columns, rows=rows, height=height * rows), buffer, format="svg", metadata={"Date": None}
    )
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_picture(path: Path, draw: Callable[[Any], None], *, columns: int, rows: int = 1, height: float) -> None:
    """Write a drawing as a PNG file.

    Args:
        height: Of a row, in inches.
    """
    figure = _figure(draw, columns=columns, rows=rows, height=height * rows)
    with written_beside(path) as temporary:
        _save(figure, temporary, format="png", dpi=110, metadata={"Software": None})


def _figure(draw: Callable[[Any], None], *, columns: int, rows: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 0.4, height), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    draw(axes)
    return figure


def _save(figure: Any, to: Any, **how: Any) -> None:
    with warnings.catch_warnings():
        # Characters that the font does not have are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(to, **how)
