"""Removes private content from text before anything is written: what `private` finds, then the user's own function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused
from drafttrain.data_gen.serving_logs.private import emails, issued_keys, named_secrets, numbers, phones
from drafttrain.data_gen.serving_logs.private.spans import replaced
from drafttrain.data_gen.serving_logs.private.values import without_private

FINDERS = (issued_keys.find, named_secrets.find, emails.find, numbers.find, phones.find)

MOST_PASSES = 8
"""Passes over one text; in nearly all texts the second finds nothing."""

Redact = Callable[[str], str]


def redactor(*, builtin: bool, own: str | None) -> Redact:
    """Return the function that removes private content from text.

    Args:
        builtin: E-mail addresses, telephone, card and account numbers, public addresses of hosts, keys and passwords.
        own: Dotted name of the user's function `(text) -> text`, called after the built-in redaction.

    Raises:
        DataError: The user's function cannot be found.
    """
    steps: dict[str, Redact] = {"redaction": without_personal} if builtin else {}
    if own is not None:
        steps[own] = _imported(own)

    def redact(words: str) -> str:
        for name, step in steps.items():
            try:
                words = step(words)
            except Exception as error:
                # The user's function may fail in any way; text that it did not process is not kept.
                raise Refused("redaction", f"{name} failed: {type(error).__name__}") from error
            if not isinstance(words, str):
                raise Refused("redaction", f"{name} returned {type(words).__name__}, not text")
        return words

    return redact


def without_personal(text: str) -> str:
    """Return text with placeholders for what `private` finds in it.

    Linear in the length of the text, and idempotent.
    """
    for _ in range(MOST_PASSES):
        spans = [span for find in FINDERS for span in find(text)]
        if not spans:
            break
        # Pieces that were apart may be adjacent now, and have other words around them.
        text = replaced(text, spans)
    return text


def redacted(exchange: Exchange, redact: Redact) -> Exchange:
    """Return an exchange without private content. Where its text changed, ids, log-probabilities and rounds are removed: they hold the old text.

    An answer ends where its first change begins: the target did not write the placeholder, and what follows was written after
    another text.
    """
    prompt: Any = exchange.prompt
    if isinstance(prompt, str):
        prompt = redact(prompt)
    elif prompt is not None:
        prompt = [{"role": turn["role"], "content": redact(turn["content"])} for turn in prompt]
    answer = exchange.answer and redact(exchange.answer)
    names: Any = {name: redact(getattr(exchange, name))[:200] for name in ("id", "model", "domain")}
    arguments = {
        name: value if isinstance(value, bool) else without_private({name: value}, redact, max_depth=1).get(name, "")
        for name, value in exchange.template_arguments.items()
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
        raise Refused("redacted", "nothing is left of the answer")
    return replace(
        kept,
        prompt_ids=None,
        answer_ids=None,
        logprobs=None,
        rounds=None,
        num_prompt_tokens=None,
        num_answer_tokens=None,
    )


def _imported(name: str) -> Redact:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"redact_with: {name}: cannot be imported: {error}") from error
    if not callable(found):
        raise DataError(f"redact_with: {name}: is not a function of text")
    redact: Redact = found
    return redact
