"""Checkers: the right number is read; programs run only when allowed, and in a sandbox."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.data_gen.checkers.unit_tests import UnitTests, UnitTestsSettings


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 then answer 34 and 5", Fraction(34)),
        ("answer 1 answer -2.50", Fraction(-5, 2)),
        ("answer 1,234", Fraction(1234)),
        ("answer 1/2", Fraction(1, 2)),
        ("answer 1/0", None),
        ("answer none", None),
        ("34", None),
    ],
)
def test_the_number_after_the_last_marker(text, answer):
    assert Numeric().answer(text, id="") == answer


def test_digits_with_spaces_are_one_number_only_where_that_is_set():
    assert Numeric(NumericSettings(spaced_digits=True)).answer("answer 0 1 3 2 .", id="") == 132
    assert Numeric().answer("answer 0 1 3 2 .", id="") == 0
    assert Numeric(NumericSettings(after="")).answer("3 and 4", id="") == 4
    assert Numeric().correct("answer 0.50", "1/2", id="")
    assert not Numeric().correct("nothing", "1", id="")
    with pytest.raises(ValueError, match="Invalid literal"):
        Numeric().correct("nothing", "", id="")


def unit_tests(tmp_path: Path, tests: str, **settings: object) -> UnitTests:
    (tmp_path / "tests.jsonl").write_text(json.dumps({"id": "a", "tests": tests}))
    return UnitTests(UnitTestsSettings(path=str(tmp_path / "tests.jsonl"), allow_code_execution=True, **settings))


def test_nothing_is_run_unless_it_is_allowed(tmp_path):
    settings = UnitTestsSettings(path="x")
    assert settings.check()[0].startswith("allow_code_execution: must be true")
    with pytest.raises(DataError, match="allow_code_execution is false"):
        UnitTests(settings)


def test_a_program_passes_its_tests_or_it_does_not(tmp_path):
    checker = unit_tests(tmp_path, "assert double(3) == 6", timeout_seconds=60)
    assert checker.answer("def double(x): return 2 * x", id="a")
    assert checker.answer("Here:\n```python\ndef double(x): return x + x\n```\nDone.", id="a")
    assert not checker.answer("def double(x): return x", id="a")
    assert not checker.answer("def double(x:", id="a")
    with pytest.raises(DataError, match="no tests for 'b'"):
        checker.answer("", id="b")


@pytest.mark.parametrize(
    ("program", "seconds"),
    [
        ("while True: pass", 1),
        # Another limit of the sandbox ends these, long before the time limit.
        ("x = bytearray(1 << 30)", 60),
        ("open('big', 'wb').write(b'0' * (2 << 20))", 60),
        ("import socket; socket.create_connection(('127.0.0.1', PORT), timeout=30)", 60),
    ],
)
def test_a_program_that_takes_too_much_fails(tmp_path, program, seconds):
    """Without the sandbox all would pass except the first, which would not end: the tests check nothing, and a server listens."""
    import socket

    checker = unit_tests(tmp_path, "pass", timeout_seconds=60, memory_mb=256, file_mb=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert checker.answer("pass", id="a")
        checker.settings.timeout_seconds = seconds
        began = time.monotonic()
        assert not checker.answer(program.replace("PORT", str(server.getsockname()[1])), id="a")
        assert seconds == 1 or time.monotonic() - began < seconds
