"""Marked text: colour on a terminal, plain marks elsewhere, and no text that drives the terminal."""

from __future__ import annotations

import io
import sys
from typing import IO

import pytest

from drafttrain.core.marked_text import ASCII, COLOUR, NONE, PLAIN, MarkedOutput


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def written(monkeypatch, out: IO[str], *parts: tuple[str, bool], marks: bool = True) -> MarkedOutput:
    """Write (text, marked) parts to a stdout of its own."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        output = MarkedOutput(marks=marks)
        for text, marked in parts:
            output.write(text, marked=marked)
    return output


def test_a_terminal_gets_colour(monkeypatch):
    out = Terminal()
    output = written(monkeypatch, out, ("drafted", True), (" own\n", False), ("", True))
    assert output.marks is COLOUR
    assert out.getvalue() == "\x1b[32mdrafted\x1b[0m own\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colour_gets_plain_marks(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    out = Terminal()
    assert written(monkeypatch, out, ("drafted", True), (" own", False)).marks is PLAIN
    assert out.getvalue() == "‹drafted› own"


def test_a_file_gets_plain_marks_or_none(monkeypatch):
    out = io.StringIO()
    assert written(monkeypatch, out, ("drafted", True)).marks is PLAIN
    assert written(monkeypatch, out, ("drafted", True), marks=False).marks is NONE
    assert out.getvalue() == "‹drafted›drafted"


def test_an_output_that_cannot_show_the_marks_gets_others(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert written(monkeypatch, out, ("é‹", True)).marks is ASCII
    assert out.buffer.getvalue() == "<é\\u2039>".encode("latin-1")


def test_control_characters_are_escaped_and_lines_are_not(monkeypatch):
    out = Terminal()
    written(monkeypatch, out, ("a\x1b[31m\nb\x07\t", True))
    assert out.getvalue() == "\x1b[32ma\\x1b[31m\nb\\x07\t\x1b[0m"
