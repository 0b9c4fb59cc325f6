"""What must not be kept is taken out of text before anything is written: addresses, numbers, keys, and what the user adds."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused

# Repetitions are bounded, so that no text takes more than linear time.
EMAIL = re.compile(r"[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}|(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![\w])"
)
KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]{0,20000}?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,200}"
    r"|\b(?:ghp|gho|ghu|ghs|ghr|github_pat|glpat|hf|xox[abprs])[_-][A-Za-z0-9_-]{10,250}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,40}"
    r"|\beyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{8,8000}(?:\.[A-Za-z0-9_-]{0,2000})?"
    r"|(?i:\bbearer )[A-Za-z0-9._~+/=-]{12,2000}"
    r"|(?i:\b(?:api[_-]?key|secret|token|passw(?:or)?d)\b[\"']{0,1} {0,3}[:=] {0,3}[\"']{0,1})[^\s\"',;]{8,500}"
)
PATTERNS = ((KEY, "[key]"), (EMAIL, "[e-mail]"), (PHONE, "[phone]"))

Redact = Callable[[str], str]


def redactor(*, builtin: bool, own: str | None) -> Redact:
    """Return the function from text to text that may be kept.

    Args:
        builtin: E-mail addresses, telephone numbers and keys.
        own: Dotted name of the user's function `(text) -> text`, called after that.

    Raises:
        DataError: The user's function cannot be found.
    """
    steps: list[Redact] = [without_personal] if builtin else []
    if own is not None:
        steps.append(_imported(own))

    def redact(words: str) -> str:
        for step in steps:
            try:
                words = step(words)
            except Exception as error:
                # A stranger's function may fail in any way; what it has not seen to the end is not kept.
                raise Refused("redaction", f"{own} failed: {type(error).__name__}") from error
            if not isinstance(words, str):
                raise Refused("redaction", f"{own} returned {type(words).__name__}, not text")
        return words

    return redact


def without_personal(words: str) -> str:
    """Return text with placeholders for e-mail addresses, telephone numbers and keys."""
    for pattern, placeholder in PATTERNS:
        words = pattern.sub(placeholder, words)
    return words


def redacted(exchange: Exchange, redact: Redact) -> Exchange:
    """Return an exchange that may be kept. Where its text had to change, its ids, its law and its rounds, which spell the old one, are gone.

    An answer ends where its first change begins: what stands in its place the target did not write, and what follows it was
    written after something else.
    """
    prompt: Any = exchange.prompt
    if isinstance(prompt, str):
        prompt = redact(prompt)
    elif prompt is not None:
        prompt = [{"role": turn["role"], "content": redact(turn["content"])} for turn in prompt]
    answer = exchange.answer and redact(exchange.answer)
    names: Any = {name: redact(getattr(exchange, name))[:200] for name in ("id", "model", "domain")}
    arguments = {
        name: redact(value) if isinstance(value, str) else value for name, value in exchange.template_arguments.items()
    }
    kept = replace(exchange, prompt=prompt, template_arguments=arguments, **names)
    if (prompt, answer) == (exchange.prompt, exchange.answer):
        return kept
    if answer != exchange.answer:
        assert answer is not None
        assert exchange.answer is not None
        same = (a == b for a, b in zip(answer, exchange.answer, strict=False))
        length = next((i for i, equal in enumerate(same) if not equal), min(len(answer), len(exchange.answer)))
        kept = replace(kept, answer=answer[:length], finish="redacted")
    if not kept.answer:
        raise Refused("redacted", "nothing of the answer may be kept")
    return replace(
        kept, prompt_ids=None, answer_ids=None, law=None, rounds=None, num_prompt_tokens=None, num_answer_tokens=None
    )


def _imported(name: str) -> Redact:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"redact_with: {name}: cannot be imported: {error}") from error
    if not callable(found):
        raise DataError(f"redact_with: {name}: is no function of text")
    redact: Redact = found
    return redact
