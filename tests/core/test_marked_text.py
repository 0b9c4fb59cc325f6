"""Marked text: colour on a terminal, plain marks elsewhere, and no text that drives the terminal."""

from __future__ import annotations

import io
import sys

import pytest

from drafttrain.core.marked_text import ASCII, COLOUR, NONE, PLAIN, MarkedOutput


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    return sys.stdout


def test_a_terminal_gets_colour(terminal):
    output = MarkedOutput()
    output.write("drafted", marked=True)
    output.write(" own\n")
    output.write("", marked=True)
    assert output.marks is COLOUR
    assert terminal.getvalue() == "\x1b[32mdrafted\x1b[0m own\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colour_gets_plain_marks(terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    output = MarkedOutput()
    output.write("drafted", marked=True)
    assert output.marks is PLAIN
    assert terminal.getvalue() == "‹drafted›"


def test_a_file_gets_plain_marks_or_none(terminal, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    MarkedOutput().write("drafted", marked=True)
    without = MarkedOutput(marks=False)
    without.write("drafted", marked=True)
    assert without.marks is NONE
    assert file.getvalue() == "‹drafted›drafted"


def test_an_output_that_cannot_show_the_marks_gets_others(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert MarkedOutput().marks is ASCII


def test_control_characters_are_escaped_and_lines_are_not(terminal):
    MarkedOutput().write("a\x1b[31m\nb\x07\t", marked=True)
    assert terminal.getvalue() == "\x1b[32ma\\x1b[31m\nb\\x07\t\x1b[0m"
