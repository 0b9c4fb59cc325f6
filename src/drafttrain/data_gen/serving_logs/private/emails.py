"""E-mail addresses in any script, but not lookalikes: git remotes, matrix products, versions, names of images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from drafttrain.data_gen.serving_logs.private.spans import Span

MARKS = r"\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Vowel signs, which `re` does not count as letters."""
LOCAL = re.compile(rf"[\w{MARKS}.!#$%&'*+/=?^`{{|}}~-]{{1,64}}")
QUOTED_LOCAL = re.compile(r"\"[^\"\n]{1,62}\"")
LABEL = rf"[\w{MARKS}](?:[\w{MARKS}-]{{0,62}})"
DOMAIN = re.compile(
    rf"(?:{LABEL}[.\u3002\uff0e]){{1,8}}(?:xn--[a-zA-Z0-9-]{{2,59}}|[^\W\d_][\w{MARKS}]{{1,23}})|\[\d{{1,3}}(?:\.\d{{1,3}}){{3}}\]"
)
SPELLED = re.compile(
    r"(?i)(?<![\w.+-])[\w.+-]{1,64} ?[\[({] ?(?:at|ät|arroba|arobase) ?[\])}] ?[\w-]{1,63}(?: ?(?:[\[({] ?(?:dot|punkt|punto|point|ponto) ?[\])}]|\.) ?[\w-]{1,63}){1,4}"
)
FILES = re.compile(
    r"(?:png|jpe?g|gif|svg|webp|ico|bmp|[mc]?js|tsx?|jsx|json|txt|s?css|less|html?|ya?ml|toml|lock|xml|csv|tgz|gz|whl|dll|exe|pdf|mp[34]|wav|ttf|woff2?)"
)
"""File extensions that are not top-level domains."""
ATTRIBUTES = re.compile(
    r"(?:shape|weights?|transpose|mean|sum|data|grad|values?|view|size|reshape|bias|matrix|inverse|dot|conj|real|imag|length|items?|get|tensor)"
)
REMOTE_USERS = {"git", "hg", "svn", "bzr"}
PATH = re.compile(r":(?!//)(?:[~/]|[\w.-]{1,64}/|\\)")


def find(text: str) -> Iterator[Span]:
    """Yield the e-mail addresses in a text."""
    for sign in ("@", "\uff20"):
        place = text.find(sign)
        while place >= 0:
            yield from _around(text, place)
            place = text.find(sign, place + 1)
    if "[" in text or "(" in text or "{" in text:
        yield from (Span(m.start(), m.end(), "e-mail") for m in SPELLED.finditer(text))


def _around(text: str, place: int) -> Iterator[Span]:
    domain = DOMAIN.match(text, place + 1)
    if domain is None:
        return
    # Match backwards from the sign: forwards, every letter of a long word could begin an address.
    reversed_before = text[max(0, place - 64) : place][::-1]
    local = QUOTED_LOCAL.match(reversed_before) or LOCAL.match(reversed_before)
    if local is None:
        return
    name = local[0][::-1]
    if not name.startswith('"'):
        name = re.sub(r"^.*[=?&`|/{}]|^['*!#$%^.]+", "", name)
    if text.endswith("://", 0, place - len(name)):
        return  # The user part of a URL.
    if not name or _is_code(text, name, domain):
        return
    yield Span(place - len(name), domain.end(), "e-mail")


def _is_code(text: str, name: str, domain: re.Match[str]) -> bool:
    labels = re.split(r"[.\u3002\uff0e]", domain[0].lower())
    after = text[domain.end() : domain.end() + 80]
    if (
        labels[0] in ("self", "cls", "this")
        or FILES.fullmatch(labels[-1])
        or ATTRIBUTES.fullmatch(labels[-1])
        or after[:1] in ("(", "[")
    ):
        return True
    if name in REMOTE_USERS or PATH.match(after):
        return True
    # example: package@1.2.x
    return len(labels) > 2 and labels[0].isdigit() and labels[1][:1].isdigit()
