"""Text with marked parts as one HTML page that needs no other file and runs nothing."""

from __future__ import annotations

import html
from pathlib import Path

from drafttrain.core.files import written_beside
from drafttrain.core.printable import printable

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em;font:13px/1.6 monospace}"
    "mark{background:#b6e8b6;color:#062}mark,span{border-left:1px solid #0002}h2{font-size:1em;margin:1.6em 0 .3em}"
)


class MarkedPage:
    """Collects records and writes them into a file.

    Args:
        title: Title of the page; what marks mean is written below it.
    """

    def __init__(self, title: str) -> None:
        self._parts = [
            "<!doctype html>\n<html lang=en><meta charset=utf-8>",
            f"<title>{_escaped(title)}</title><style>{STYLE}</style>\n<h1>{_escaped(title)}</h1>\n",
            "<p>Trained tokens are <mark>green</mark>. Hover over a token for its place and id.</p>\n",
        ]
        self._is_open = False

    def head(self, text: str) -> None:
        """Begin a record with a line about it."""
        self._close()
        self._parts.append(f"<h2>{_escaped(text)}</h2>\n<pre>")
        self._is_open = True

    def write(self, text: str, *, marked: bool = False, about: str = "") -> None:
        """Add a token; `about` is shown when the pointer is over it."""
        name = "mark" if marked else "span"
        # The browser drops a line end that follows <pre>; inside an element it stays.
        self._parts.append(f'<{name} title="{_escaped(about)}">{_escaped(text)}</{name}>')

    def save(self, path: Path) -> None:
        """Write the page; the file is complete or absent."""
        self._close()
        with written_beside(path) as temporary:
            temporary.write_text("".join(self._parts), encoding="utf-8")

    def _close(self) -> None:
        self._parts.append("</pre>\n" if self._is_open else "")
        self._is_open = False


def _escaped(text: str) -> str:
    return html.escape(printable(text))
