"""Console output: status lines and progress on stderr, final tables on stdout.

A terminal gets progress bars; a file or a pipe gets a line every few seconds and one at the end. With several processes
only rank 0 prints.
"""

import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console

from drafttrain.core.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_LINE_SECONDS = 10.0

stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Print one status line. If that fails (a log on a full disk), the run continues without it."""
    if _first_process():
        with suppress(OSError):
            stderr.print(printable(text, encoding=stderr.encoding), markup=False)


def complain(text: str) -> None:
    """Print an error as it is, including square brackets."""
    stderr.print(printable(text, encoding=stderr.encoding), style="red", markup=False)


@functools.cache
def say_once(text: str) -> None:
    """Print a status line once, however often it is called with the same text."""
    say(text)


class Progress:
    """The progress of one long stage: count, rate, time left."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self._note = ""
        self._began = time.monotonic()
        # The rate counts from the first report: that one contains the warm-up, or the work of an earlier run.
        self._first: tuple[int, float] | None = None

    def advance(self, count: int = 1) -> None:
        """Add `count` units to those done."""
        self.done += count
        if self._first is None:
            self._first = (self.done, time.monotonic())
        self._show()

    def note(self, text: str) -> None:
        """Show a few words next to the numbers until the next note."""
        self._note = text
        self._show()

    def close(self, *, failed: bool) -> None:
        """Report the end of the stage."""

    def _show(self) -> None:
        """Update the display."""

    @property
    def rate(self) -> float | None:
        """Units per second since the first report."""
        if self._first is None or self.done == self._first[0]:
            return None
        return (self.done - self._first[0]) / max(1e-9, time.monotonic() - self._first[1])

    def status(self) -> str:
        """Return the text of a line or a bar: count, share, rate, time left, note."""
        parts = [f"{self.done:,} {self.unit}"]
        if self.total is not None:
            parts = [f"{self.done:,}/{self.total:,} {self.unit} ({self.done / max(1, self.total):.0%})"]
        if self.rate is not None:
            parts.append(f"{_number(self.rate)} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        return "  ".join([*parts, self._note]).rstrip()


class _PlainProgress(Progress):
    """Log lines for an output that is not a terminal."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        # The first line comes after half the interval: nobody waits longer for a sign of life.
        self._last_line = time.monotonic() - PLAIN_LINE_SECONDS / 2

    def _show(self) -> None:
        if time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self.description}: {self.status()}")

    def close(self, *, failed: bool) -> None:
        took = duration(time.monotonic() - self._began)
        say(f"{self.description}: {'stopped' if failed else 'done'} after {took}  {self.status()}")


class _BarProgress(Progress):
    """A bar on a terminal. Bars that are open at the same time share one display."""

    display: "RichProgress | None" = None
    """The display that all open bars share; None while no bar is open."""
    open_bars = 0

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        if _BarProgress.display is None:
            _BarProgress.display = _display()
            _BarProgress.display.start()
        _BarProgress.open_bars += 1
        self._task: TaskID = _BarProgress.display.add_task(description, total=total, status=self.status())

    def _show(self) -> None:
        assert _BarProgress.display is not None
        _BarProgress.display.update(self._task, completed=self.done, status=self.status())

    def close(self, *, failed: bool) -> None:
        assert _BarProgress.display is not None
        _BarProgress.display.remove_task(self._task)
        _BarProgress.open_bars -= 1
        if _BarProgress.open_bars == 0:
            _BarProgress.display.stop()
            _BarProgress.display = None
        took = duration(time.monotonic() - self._began)
        say(f"{self.description}: {'stopped' if failed else 'done'} after {took}  {self.status()}")


@contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show the progress of a stage of `total` units (None: unknown) until the block ends."""
    shown: Progress
    if not _first_process():
        shown = Progress(description, total, unit)
    elif stderr.is_terminal:
        shown = _BarProgress(description, total, unit)
    else:
        shown = _PlainProgress(description, total, unit)
    failed = True
    try:
        yield shown
        failed = False
    finally:
        shown.close(failed=failed)


def table(rows: Sequence[Sequence[object]], *, columns: Sequence[str], title: str = "") -> None:
    """Print a final table on stdout: drawn on a terminal, aligned plain text elsewhere. Numbers are right-aligned."""
    if not _first_process():
        return
    out = Console(highlight=False)
    title = printable(title, encoding=out.encoding)
    cells = [[printable(str(cell), encoding=out.encoding) for cell in row] for row in rows]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(columns))]
    if out.is_terminal:
        out.print(_drawn(cells, columns=columns, right=right, title=title))
    else:
        sys.stdout.write(_plain(cells, columns=columns, right=right, title=title))
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _first_process() -> bool:
    """Return whether this process prints: rank 0, by the launcher's variables."""
    numbers = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in numbers)


def _display() -> "RichProgress":
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[status]}", markup=False),
    )
    return RichProgress(*columns, console=stderr)


def _drawn(cells: list[list[str]], *, columns: Sequence[str], right: Sequence[bool], title: str) -> object:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE, pad_edge=False)
    for name, is_right in zip(columns, right, strict=True):
        drawn.add_column(Text(name), justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    return drawn


def _plain(cells: list[list[str]], *, columns: Sequence[str], right: Sequence[bool], title: str) -> str:
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    text = [aligned(columns), aligned(["-" * width for width in widths]), *map(aligned, cells)]
    return "\n".join([title, *text] if title else text) + "\n"


def _numeric(cell: str) -> bool:
    """Return whether a cell starts like a number, or is empty."""
    return not cell or cell.lstrip("+-<>=~ ")[:1].isdigit() or cell in ("-", "nan")


def _number(value: float) -> str:
    """Return a rate with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
