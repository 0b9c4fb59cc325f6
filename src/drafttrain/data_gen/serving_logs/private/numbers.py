"""Card numbers (Luhn, ISO/IEC 7812), account numbers (IBAN, mod 97, ISO 13616), national identity numbers, and public IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from drafttrain.data_gen.serving_logs.private.spans import Span

CARD = re.compile(r"(?<![A-Za-z0-9_.,+-])\d(?:[ \-\u00a0]?\d){12,18}(?![A-Za-z0-9_]|[.,-]\d|[ -]\d)")
BRANDS = (
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6(?:011|4[4-9]|5)"), (16, 19)),
    (re.compile(r"3(?:0[0-5]|[689])"), (14, 16)),
    (re.compile(r"35(?:2[89]|[3-8])"), (16,)),
    (re.compile(r"62"), (16, 17, 18, 19)),
    (re.compile(r"5018|5020|5038|6304|67(?:59|6[1-3])"), (16, 18, 19)),
    (re.compile(r"220[0-4]"), (16,)),
)
"""First digits and lengths."""
GROUPS = {
    (16,),
    (15,),
    (14,),
    (19,),
    (18,),
    (17,),
    (13,),
    (4, 4, 4, 4),
    (4, 6, 5),
    (4, 6, 4),
    (4, 4, 4, 4, 3),
    (4, 4, 5, 4),
    (6, 13),
}
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ \-\u00a0]?[A-Za-z0-9]{4})")
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24,
    "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26,
    "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
IPV4 = re.compile(r"(?<![A-Za-z0-9_.])(?:\d{1,3}\.){3}\d{1,3}(?![A-Za-z0-9_]|\.\d|-[a-z])")
VERSION = re.compile(
    r"(?i)(?:\b(?:v|ver|version|versions|release|build|revision|section|chapter|§|oid|upgrade|update|bump)\b[^\d\n]{0,12}|[=<>~^]{1,2} ?|[A-Za-z)]/|\bv)\Z"
)
IPV6 = re.compile(r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{2,3}:[0-9A-Fa-f:]{2,40}(?:\.\d{1,3}){0,3}(?![A-Za-z0-9_:])")
IDENTITY = re.compile(
    r"(?i)\b(?:ssn|social security|sozialversicherungs\w{0,8}|national insurance|nino|bsn|cpf|curp|aadhaar|aadhar|pesel|(?-i:SIN|PAN|NIE|DNI|TIN)|personnummer|codice fiscale"
    r"|passport|reisepass\w{0,8}|passeport|pasaporte|driver'?s? licen[cs]e|driving licen[cs]e|führerschein\w{0,8}|tax id|steuer-?id\w{0,20}|identity card|id card"
    r"|personalausweis\w{0,8}|身份证|護照|护照|마이넘버|マイナンバー)(?:[ -]?(?:number|num|no\.?|nr\.?|nummer|numéro|#|号码?|號碼?|id)){0,2}(?:\s?[:：#=]\s?|\s(?:is|ist|est|es)\s|\s|(?<=[号码號碼证照]))"
    r"[\"']?(?P<value>(?:[A-Za-z]{1,4}[ -]?)?\d[A-Za-z0-9]{0,20}(?:[ .\-/]\d[A-Za-z0-9]{0,12}){0,5}(?:[ -][A-Z])?)(?![\w(\[=])"
)
"""National identity numbers, after the word for them."""
LEAST_IDENTITY = 7
"""Fewest digits and letters of an identity number; at least 5 must be digits."""
RESOLVERS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222"}
"""Public resolvers, which many configurations hold."""
DOCUMENTED = tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")))
"""Documentation networks: people use them in place of a real address, and redacting them loses nothing."""


def find(text: str) -> Iterator[Span]:
    """Yield the card, account and identity numbers and the public IP addresses in a text."""
    for match in CARD.finditer(text):
        if is_card(match[0]):
            yield Span(match.start(), match.end(), "card")
    for match in IBAN.finditer(text):
        if stop := _iban_stop(text, match.start()):
            yield Span(match.start(), stop, "iban")
    for match in IDENTITY.finditer(text):
        taken = [one for one in match["value"] if one.isalnum()]
        if len(taken) >= LEAST_IDENTITY and sum(map(str.isdigit, taken)) >= 5:
            yield Span(match.start("value"), match.end("value"), "id")
    for match in IPV4.finditer(text):
        if _is_host(text, match):
            yield Span(match.start(), match.end(), "ip")
    for match in IPV6.finditer(text):
        address = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
        if address.count(":") >= 2 and any(map(str.isdigit, address)) and _is_public(address):
            yield Span(match.start(), match.start() + len(address), "ip")


def is_card(number: str) -> bool:
    """Return whether a number has the first digits, the length and the check digit of a card."""
    groups = tuple(map(len, re.findall(r"\d+", number)))
    digits = re.sub(r"\D", "", number)
    if groups not in GROUPS or len(set(digits)) < 2:
        return False
    return any(first.match(digits) and len(digits) in lengths for first, lengths in BRANDS) and _luhn(digits)


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _iban_stop(text: str, start: int) -> int | None:
    """Return the end of the account number that begins here; None: there is none."""
    length = IBAN_LENGTHS.get(text[start : start + 2].upper())
    if length is None:
        return None
    taken, place = "", start
    while place < len(text) and len(taken) < length:
        one = text[place]
        if one.isascii() and one.isalnum():
            taken += one.upper()
        elif one not in " -\u00a0" or text[place - 1] in " -\u00a0":
            return None
        place += 1
    if len(taken) < length or re.match("[A-Za-z0-9]", text[place : place + 1]):
        return None
    turned = taken[4:] + taken[:4]
    return place if int("".join(str(int(one, 36)) for one in turned)) % 97 == 1 else None


def _is_host(text: str, match: re.Match[str]) -> bool:
    octets = match[0].split(".")
    if any(int(one) > 255 or (len(one) > 1 and one[0] == "0") for one in octets) or match[0] in RESOLVERS:
        return False
    before = text[max(0, match.start() - 24) : match.start()]
    # 1.2.3.4 is a version or a section.
    if VERSION.search(before) or all(len(one) == 1 for one in octets) or octets[0] == "0":
        return False
    return _is_public(match[0])


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (found.is_global and not found.is_multicast) or any(found in network for network in DOCUMENTED)
