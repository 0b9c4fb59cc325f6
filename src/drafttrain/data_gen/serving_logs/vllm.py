"""vLLM's request log (`--enable-log-requests --enable-log-outputs`, VLLM_LOGGING_LEVEL=DEBUG): request and answer are two lines.

Up to about 0.12 the line `Received request` holds the prompt; later a line `Request ... details` does, which only the level DEBUG writes.
"""

from __future__ import annotations

import ast
import re
from array import array

from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused
from drafttrain.data_gen.serving_logs.untrusted import check_text

QUOTED = r"""(None|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
IDS = r"(None|\[[^\]]*\])"
NUMBER = re.compile(r"[0-9]{1,9}")
START = re.compile(r"Received request |Request (?=\S{1,200} details: prompt: )|Generated response ")
PREFIX = 400
"""Longest prefix that a logger writes before the message, in characters."""
ASKED = re.compile(rf"(\S{{1,200}}?)(?: details)?: prompt: {QUOTED}, (?:.*?, )?prompt_token_ids: {IDS}", re.DOTALL)
ANSWERED = re.compile(
    rf"(\S{{1,200}}?)(?: \(streaming (complete|delta)\))?: output: {QUOTED}, (?:output_token_ids: {IDS}, )?"
    r"finish_reason: (\S{1,40})"
)
WITHOUT_PROMPT = re.compile(r"\S{1,200}?: params: ")


MAX_WAITING = 10_000
MAX_WAITING_BYTES = 256 * 2**20
"""Size of the lines that hold the waiting requests."""


class Requests:
    """Requests that wait for their answers, by id; the oldest are forgotten when there are too many, or too long ones."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str | None, array[int] | None, int]] = {}
        self._bytes = 0

    def is_vllm(self, line: str) -> bool:
        """Return whether a line is of this log and is about a request."""
        return START.search(line, 0, PREFIX) is not None

    def exchanges(self, line: str, *, id: str) -> list[Exchange]:
        """Return the exchange that a line completes, or nothing.

        Raises:
            Refused: The line has an unknown form, or its request was not logged before.
        """
        start = START.search(line, 0, PREFIX)
        assert start is not None, "is_vllm was asked before"
        # Match at one place only: searching a hostile line would take hours.
        if asked := ASKED.match(line, start.end()):
            name, prompt, prompt_ids = asked.groups()
            self._take(name)
            listed = _ids(prompt_ids)
            # A list would take ten times the memory of the line.
            self._waiting[name] = (_literal(prompt), None if listed is None else array("q", listed), len(line))
            self._bytes += len(line)
            while len(self._waiting) > MAX_WAITING or self._bytes > MAX_WAITING_BYTES:
                self._take(next(iter(self._waiting)))
            return []
        if WITHOUT_PROMPT.match(line, start.end()):
            return []
        found = ANSWERED.match(line, start.end())
        if not found:
            raise Refused("not_a_record", "a line of vLLM's log that is cut off, or has an unknown form")
        name, streamed, answer, answer_ids, finish = found.groups()
        if streamed == "delta":
            return []
        known = self._take(name) or self._take(f"{name}-0")
        if known is None:
            raise Refused("no_request", "the prompt is not logged before the answer: vLLM logs it at the level DEBUG")
        prompt, prompt_ids, _ = known
        return [
            Exchange(
                id=name,
                prompt=prompt,
                answer=_literal(answer),
                prompt_ids=None if prompt_ids is None else list(prompt_ids),
                answer_ids=_ids(answer_ids),
                finish="" if streamed else finish,
            )
        ]

    def _take(self, name: str) -> tuple[str | None, array[int] | None, int] | None:
        """Remove a waiting request and return it; None: no request of this name waits."""
        found = self._waiting.pop(name, None)
        self._bytes -= found[2] if found else 0
        return found


def _literal(quoted: str) -> str | None:
    """Return the text of a string that Python's repr quoted; the pattern matches nothing else."""
    try:
        words = ast.literal_eval(quoted)
    except (ValueError, SyntaxError) as error:
        raise Refused("not_a_record", "a quoted text that cannot be parsed") from error
    if words is None:
        return None
    check_text(words)
    return str(words)


def _ids(listed: str | None) -> list[int] | None:
    if listed is None or listed == "None":
        return None
    numbers = [part.strip() for part in listed[1:-1].split(",")]
    if numbers == [""]:
        return []
    if not all(NUMBER.fullmatch(number) for number in numbers):
        raise Refused(
            "wrong_type",
            "token ids must be integers between commas; a list that was shortened for the log holds something else",
        )
    return [int(number) for number in numbers]
