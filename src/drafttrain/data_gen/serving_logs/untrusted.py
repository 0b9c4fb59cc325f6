"""From a line of bytes that anybody may have written to a JSON object within limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.serving_logs.exchange import Refused

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What no text of a chat holds: control characters but tab and line ends, and halves of surrogate pairs."""


@contextmanager
def guard() -> Iterator[None]:
    """Turn whatever a line of a log makes the block raise into a reason to quarantine that line.

    Everything that is done with a line stands under this guard. Without it one line would end the reader, and again at every
    restart, as its place is stored behind the line only once the line is accounted for. The reason does not repeat the line.

    Raises:
        Refused: The block failed.
    """
    try:
        yield
    except Refused:
        raise
    except BadItem as error:
        raise Refused(
            "no_tokens", "its text gives none within data.max_length by this tokenizer and its chat template"
        ) from error
    except (MemoryError, OSError):
        raise  # Of the machine and not of the line: lines are bounded.
    except Exception as error:
        raise Refused("unreadable", f"reading it failed with {type(error).__name__}") from error
    except BaseException as error:
        # What the Rust of tokenizers raises when it panics is no Exception.
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
        Refused: It is none, is nested too deep, or holds what is no text or no number.
    """
    try:
        value = json.loads(line, parse_constant=_no_number)
    except RecursionError as error:
        raise Refused("too_deep", f"more than {max_depth} levels") from error
    except ValueError as error:
        raise Refused("not_json", "cut off, or no JSON") from error
    if not isinstance(value, dict):
        raise Refused("wrong_type", f"a JSON object is needed, got {type(value).__name__}")
    _check(value, max_depth=max_depth)
    return value


def check_text(words: str) -> None:
    """Refuse text with control characters or half characters."""
    if CONTROL.search(words):
        raise Refused("control_characters", "text holds control characters, or half a surrogate pair")


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
    raise Refused("not_a_number", f"{word} stands where a number should be")
