"""Telephone numbers: candidates by form, checked by libphonenumber (`phonenumbers`) for the regions that use that form.

An international number needs no context. A national one counts if it is grouped like a telephone number and valid in some region, or
if it follows a word such as "call". A bare run of digits is an order number, a time or an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import phonenumbers
from phonenumbers import PhoneNumberType

from drafttrain.data_gen.serving_logs.private.spans import Span

GAP = r"[ ().\-/\u00a0\u2009\u2010\u2011\u2012\u2013\u202f]"
INTERNATIONAL = re.compile(
    rf"(?<![A-Za-z0-9_+.])(?:[+\uff0b] ?|00(?=[1-9]))\(?\d(?:{GAP}{{0,3}}\d){{6,14}}(?![A-Za-z0-9_]|[.,]\d)"
)
NATIONAL = re.compile(
    rf"(?<![A-Za-z0-9_+.,:=#$€£%@/\\-])\(?\d(?:{GAP}{{0,3}}\d){{6,14}}(?![A-Za-z0-9_%]| ?=|[.,:/\-]\d|{GAP}\d)"
)
DATE = re.compile(
    r"(?<![\d./-])(?:[0-3]?\d([./-])[0-3]?\d\1(?:19|20)?\d\d(?!\d|\1\d)|(?:19|20)\d\d([./-])[01]?\d\2[0-3]?\d)"
)
FORMS = re.compile(
    r"\(\d{3}\) ?\d{3}[-. ]\d{4}|1?[-. ]?[2-9]\d{2}([-.])[2-9]\d{2}\1\d{4}|1[3-9]\d([ -])\d{4}\2\d{4}|\(\d{2,5}\) ?\d{3,5}[ -]\d{3,4}(?:[ -]\d{2,4})?"
    r"|8 ?\(\d{3,5}\) ?\d{1,3}-\d{2}-\d{2}|8[ -]\d{3}[ -]\d{3}[ -]\d{2}[ -]\d{2}|1[358]00[ -]\d{3}[ -]\d{3}"
)
"""National forms that only telephone numbers have."""
WORD = re.compile(
    r"(?i)(?:phone|\btel\b|telef|téléph|\bcall\b|\bcell\b|mobile|mobil\b|móvil|\bfax\b|whats ?app|\bsms\b|\btext me|handy|celular|celul|portable|appel|llám|ligue"
    r"|\bring\b|\bruf|anruf|numéro de|телефон|\bтел\b|моб|звон|电话|電話|手机|手機|携帯|号码|전화|연락|फ़ोन|फोन|هاتف|جوال|telefoon|komórk|\bcontact)"
)
WORD_CHARACTERS = 32
REGIONS = ("US", "GB", "DE", "FR", "IT", "ES", "JP", "CN", "IN", "BR", "AU", "NL", "CH", "AT", "BE", "SE", "NO", "DK", "FI", "PL", "PT", "RU", "KR", "MX", "TR",
           "ZA", "IE", "CZ", "GR", "IL", "SG", "HK", "TW", "AR", "CL", "CO", "NZ", "UA", "RO", "HU", "ID", "TH", "VN", "MY", "PH", "SA", "AE", "EG", "NG", "KE", "PK")  # fmt: skip
OPERATOR = re.compile(r" [-/] |/")
COUNTED = "0123456789012"
"""Digits in counting order, not a telephone number."""
MAX_JUDGED = 2000
"""Distinct candidates of a text that are checked; beyond it only the form decides, so that a table of numbers does not take minutes."""


def find(text: str) -> Iterator[Span]:
    """Yield the telephone numbers in a text."""
    judged: dict[str, bool] = {}
    for match in INTERNATIONAL.finditer(text):
        named = match[0][0] == "0" and _is_named(text, match.start(), match.end())
        if _judged(judged, match[0], _is_possible if named else _is_international):
            yield Span(match.start(), match.end(), "phone")
    for match in NATIONAL.finditer(text):
        number = match[0]
        start = match.start()
        if number.count("(") != number.count(")"):
            continue
        if FORMS.fullmatch(number):
            yield Span(start, match.end(), "phone")
            continue
        if DATE.search(number):
            continue
        named = _is_named(text, start, match.end())
        judge = _is_somewhere if named else _is_written_so
        if _judged(judged, number, judge):
            yield Span(start, match.end(), "phone")


def _is_named(text: str, start: int, stop: int) -> bool:
    """Return whether a word for telephones precedes a number, or follows it directly."""
    before = text[max(0, start - WORD_CHARACTERS) : start].rpartition("\n")[2]
    return WORD.search(before) is not None or WORD.search(text[stop : stop + 14].partition("\n")[0]) is not None


def _judged(known: dict[str, bool], number: str, judge: object) -> bool:
    key = f"{judge.__name__}{number}"  # type: ignore[attr-defined]
    if key not in known:
        if len(known) >= MAX_JUDGED:
            return judge is _is_international
        known[key] = bool(judge(number))  # type: ignore[operator]
    return known[key]


@lru_cache(maxsize=1 << 16)
def _is_international(number: str) -> bool:
    """Return whether a number with its country code is valid."""
    if number[0] != "0":
        return _is_possible(number)
    found = _parsed(_dialled(number), None)
    return found is not None and bool(phonenumbers.is_valid_number(found))


@lru_cache(maxsize=1 << 16)
def _is_possible(number: str) -> bool:
    """Return whether a number with its country code has a length that its country uses: invented numbers are redacted too."""
    found = _parsed(_dialled(number), None)
    return found is not None and bool(phonenumbers.is_possible_number(found))


def _dialled(number: str) -> str:
    return "+" + number[2 if number[0] == "0" else 1 :].strip()


def _parsed(number: str, region: str | None) -> phonenumbers.PhoneNumber | None:
    try:
        return phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return None


@lru_cache(maxsize=1 << 16)
def _is_written_so(number: str) -> bool:
    """Return whether a number with a leading 0, in usual groups, is valid in some region."""
    digits = re.sub(r"\D", "", number)
    groups = re.findall(r"\d+", number)
    if digits[0] != "0" or digits[1] == "0" or not 9 <= len(digits) <= 12 or len(groups) > 6 or len(groups[0]) < 2:
        return False
    if digits in COUNTED:
        return False
    kinds = (PhoneNumberType.MOBILE,) if len(groups) == 1 else None
    return any(_is_of(number, region, kinds) for region in REGIONS)


@lru_cache(maxsize=1 << 16)
def _is_somewhere(number: str) -> bool:
    """Return whether a number beside a word for telephones is one; for grouped digits the length is enough."""
    digits = re.sub(r"\D", "", number)
    if digits[0] != "0" and OPERATOR.search(number):
        return False
    if 7 <= len(digits) <= 13 and not number.isdigit():
        return True
    return any(_is_of(number, region, None) for region in REGIONS)


def _is_of(number: str, region: str, kinds: tuple[int, ...] | None) -> bool:
    found = _parsed(number, region)
    if found is None or not phonenumbers.is_valid_number_for_region(found, region):
        return False
    return kinds is None or phonenumbers.number_type(found) in (*kinds, PhoneNumberType.FIXED_LINE_OR_MOBILE)
