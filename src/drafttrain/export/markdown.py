"""Text from outside in Markdown: it stays text, whatever backticks, bars and line ends it holds."""

import re

from drafttrain.core.printable import printable


def code(text: str) -> str:
    """Return a code span of one line."""
    line = " ".join(printable(text).split("\n"))
    ticks = "`" * (_longest_run(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{padding}{line}{padding}{ticks}"


def block(text: str, language: str) -> str:
    """Return a block of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def plain(text: str) -> str:
    """Return text for a heading, a sentence or a cell of a table: one line, nothing in it is markup."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
