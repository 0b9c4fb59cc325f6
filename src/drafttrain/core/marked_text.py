"""Text with marked parts on stdout: colour on a terminal that has it, plain marks elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from drafttrain.core.printable import printable


@dataclass(frozen=True)
class Marks:
    """What is written before and after a marked part."""

    before: str
    after: str
    legend: str
    """How marked text looks, in words."""

    def around(self, text: str) -> str:
        """Return a text between the marks; an empty text has none."""
        return f"{self.before}{text}{self.after}" if text else ""


COLOUR = Marks("\x1b[32m", "\x1b[0m", "green")
PLAIN = Marks("‹", "›", "between ‹ and ›")
ASCII = Marks("<", ">", "between < and >")
NONE = Marks("", "", "not marked")


class MarkedOutput:
    """Writes text to stdout piece by piece. Control characters are escaped, so that no text drives the terminal.

    Args:
        marks: False: nothing is marked.
    """

    def __init__(self, *, marks: bool = True) -> None:
        self._out = Console(highlight=False)
        self.marks = self._fitting() if marks else NONE

    def write(self, text: str, *, marked: bool = False) -> None:
        """Write text at once, not only at the end of a line."""
        shown = printable(text, encoding=self._out.encoding)
        self._out.file.write(self.marks.around(shown) if marked else shown)
        self._out.file.flush()

    def _fitting(self) -> Marks:
        # rich reads NO_COLOR and TERM, and knows whether stdout is a terminal.
        if self._out.color_system is not None and not self._out.no_color:
            return COLOUR
        return PLAIN if printable(PLAIN.before, encoding=self._out.encoding) == PLAIN.before else ASCII
