"""What must not be kept is taken out of text before anything is written: what `private` finds, and what the user adds."""

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
"""Over one text; the second finds nothing in nearly all."""

Redact = Callable[[str], str]


def redactor(*, builtin: bool, own: str | None) -> Redact:
    """Return the function from text to text that may be kept.

    Args:
        builtin: E-mail addresses, telephone, card and account numbers, public addresses of hosts, keys and passwords.
        own: Dotted name of the user's function `(text) -> text`, called after that.

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
                # A stranger's function may fail in any way; what it has not seen to the end is not kept.
                raise Refused("redaction", f"{name} failed: {type(error).__name__}") from error
            if not isinstance(words, str):
                raise Refused("redaction", f"{name} returned {type(words).__name__}, not text")
        return words

    return redact


def without_personal(text: str) -> str:
    """Return text with placeholders for what `private` finds in it.

    Linear in the length of the text; done again, it changes nothing.
    """
    for _ in range(MOST_PASSES):
        spans = [span for find in FINDERS for span in find(text)]
        if not spans:
            break
        # What stood apart may stand together now, and be judged by other words.
        text = replaced(text, spans)
    return text


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
