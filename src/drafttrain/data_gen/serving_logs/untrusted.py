"""From a line of untrusted bytes to a JSON object within limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.serving_logs.exchange import Refused

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Never part of a chat's text: control characters except tab and line ends, and halves of surrogate pairs."""


@contextmanager
def guard() -> Iterator[None]:
    """Turn any exception that a line of a log causes into a reason to quarantine that line.

    Everything that reads a line runs under this guard. Without it one line would stop the reader, and again at every restart,
    because the place behind a line is stored only after the line is counted. The reason never repeats the line.

    Raises:
        Refused: The block failed.
    """
    try:
        yield
    except Refused:
        raise
    except BadItem as error:
        raise Refused(
            "no_tokens", "this tokenizer and its chat template give no usable tokens within data.max_length"
        ) from error
    except (MemoryError, OSError):
        raise  # Caused by the machine, not by the line: lines are bounded.
    except Exception as error:
        raise Refused("unreadable", f"reading it failed with {type(error).__name__}") from error
    except BaseException as error:
        # A panic in the Rust code of tokenizers is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise Refused("unreadable", "the tokenizer panicked") from error


def decoded(line: bytes) -> str:
    """Return a line as text.

    Raises:
        Refused: It is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Refused("encoding", f"not UTF-8 at byte {error.start}") from error


def parsed(line: str, *, max_depth: int) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        Refused: It is not an object, is nested too deeply, or holds invalid text or numbers.
    """
    try:
        value = json.loads(line, parse_constant=_no_number)
    except RecursionError as error:
        raise Refused("too_deep", f"more than {max_depth} levels") from error
    except ValueError as error:
        raise Refused("not_json", "cut off, or not JSON") from error
    if not isinstance(value, dict):
        raise Refused("wrong_type", f"must be a JSON object, got {type(value).__name__}")
    _check(value, max_depth=max_depth)
    return value


def check_text(words: str) -> None:
    """Refuse text with control characters or halves of surrogate pairs."""
    if CONTROL.search(words):
        raise Refused("control_characters", "text holds control characters or half a surrogate pair")


def _check(value: Any, *, max_depth: int) -> None:
    """Walk a value without recursion."""
    waiting = [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, str):
            check_text(part)
        elif isinstance(part, dict | list):
            if depth > max_depth:
                raise Refused("too_deep", f"more than {max_depth} levels")
            inside = [*part, *part.values()] if isinstance(part, dict) else part
            waiting.extend((one, depth + 1) for one in inside if isinstance(one, str | dict | list))


def _no_number(word: str) -> float:
    raise Refused("not_a_number", f"{word} is not a number")
