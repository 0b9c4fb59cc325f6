"""Keys of known issuers, recognized by a prefix, by their structure, or by the words around a random string.

Patterns come from detect-secrets where it has a plugin for the issuer; the others are listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from drafttrain.data_gen.serving_logs.private.randomness import has_random_run, is_high_entropy
from drafttrain.data_gen.serving_logs.private.spans import PLACEHOLDER, Span

LONG_WORD = re.compile(r"[A-Za-z0-9_.+/=~:-]{16,}")
"""No key is shorter; every match is searched for known forms."""
FIXED = (
    r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AROA|AIDA)[A-Z0-9]{16}",
    r"AIza[A-Za-z0-9_-]{35}",
    r"gh[pousr]_[A-Za-z0-9]{20,255}",
    r"npm_[A-Za-z0-9]{30,64}",
    r"hf_[A-Za-z0-9]{30,64}",
    r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}",
    r"pypi-Ag[A-Za-z0-9_-]{40,400}",
    r"[A-Za-z0-9_~.-]{3}\dQ~[A-Za-z0-9_~.-]{31,34}",
    r"LTAI[A-Za-z0-9]{16,24}",
    r"sq0[a-z]{3}-[A-Za-z0-9_-]{22,43}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{58}",
    r"ATATT3[A-Za-z0-9_=-]{50,300}",
    r"ya29\.[A-Za-z0-9_-]{20,400}",
    r"1//0[A-Za-z0-9_-]{20,200}",
    r"GOCSPX-[A-Za-z0-9_-]{20,40}",
    r"eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,8000}(?:\.[A-Za-z0-9_-]{0,2000})?",
    r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{20,100}",
    r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40}",
    r"(?:bot)?\d{8,10}:[A-Za-z0-9_-]{35}",
    r"(?:AC|SK)[a-f0-9]{32}",
    r"[0-9a-f]{32}-us[0-9]{1,2}",
    r"key-[0-9a-z]{32}",
    r"dapi[a-f0-9]{32}(?:-\d)?",
    r"pul-[a-f0-9]{40}",
    r"oy2[a-z0-9]{43}",
    r"cio[A-Za-z0-9]{32}",
    r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}",
    r"sl\.(?:u\.)?[A-Za-z0-9_-]{60,400}",
    r"xprv[1-9A-HJ-NP-Za-km-z]{80,120}",
)
"""Forms that are sufficient by themselves."""
PREFIXED = (
    r"(?:sk|pk|rk)[-_](?:live|test|prod|proj|ant|or|svcacct|admin|lf|api03)[-_][A-Za-z0-9_-]{16,255}",
    r"sk-[A-Za-z0-9_-]{16,255}",
    r"(?:gsk|xai|pplx|r8|nvapi|tvly|fw|rnd|sbp|phc|phx|re|whsec|shpat|shpss|shpca|shppa|lin_api|ntn|secret|figd|glsa|glc|dckr_pat|dckr_oat"
    r"|github_pat|dop_v1|doo_v1|dor_v1|PMAK|NRAK|NRJS|CFPAT|bkua|tskey|xkeysib|xsmtpsib|hvs|hvb|dp\.pt|dp\.st|sntrys|sntryu|pscale_tkn"
    r"|pscale_pw|ops|vercel|cf|pat|rubygems|duffel_test|duffel_live|flw|sgp|wandb_v1|jina|co|csk|together)[-_.]"
    r"[A-Za-z0-9_.-]{20,255}",
    r"gl[a-z]{2,6}-[A-Za-z0-9_-]{16,255}",
    r"GR1348941[A-Za-z0-9_-]{16,50}",
    r"xox[a-z]-[A-Za-z0-9-]{10,255}",
    r"xapp-\d-[A-Za-z0-9-]{10,255}",
)
"""Forms whose rest must also look random: `sk_buff_alloc_headroom` is a function."""
FORM = re.compile(rf"(?<![A-Za-z0-9])(?:(?P<fixed>{'|'.join(FIXED)})|{'|'.join(PREFIXED)})(?![A-Za-z0-9])")
PAYPAL = re.compile(r"access_token\$(?:production|sandbox)\$[a-z0-9]{16}\$[a-f0-9]{32}")
WEBHOOK = re.compile(
    r"https://(?:hooks\.slack\.com/(?:services|workflows)/|(?:ptb\.|canary\.)?discord(?:app)?\.com/api/webhooks/|[\w-]{1,60}\.webhook\.office\.com/)"
    r"[A-Za-z0-9_/@-]{16,300}"
)
SEPARATORS = re.compile("[-_.]")
CONTEXT = re.compile(
    r"(?i)(?:(?:api|secret|access|auth|private|service|account|signing|encryption|master|license|admin)[ _-]?key|token(?![a-z0-9])|secret|credential|passw"
    r"|schl(?:ü|ue)ssel|\bclé\b|clave|chave|chiave|sleutel|klucz|nyckel|ключ|токен|密[钥鑰碼码]|令牌|キー|トークン|鍵|토큰|키)"
)
NO_CONTEXT = re.compile(
    r"(?i)(?:commit|hash|sha-?\d|md5|uuid|guid|checksum|digest|integrity|public|fingerprint|cache|etag|\bids?\b|;base64,|tokeni|tokens\b|vocab)"
)
HEXADECIMAL = re.compile(r"[0-9a-f]{32}(?:[0-9a-f]{8}|[0-9a-f]{32})?|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OTHER_WORD = re.compile(rf"{LONG_WORD.pattern}|{PLACEHOLDER.pattern}")
CONTEXT_CHARACTERS = 48
BEGIN = "-----BEGIN "
HEADER = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
FOOTER = re.compile(r"-----END [A-Z0-9 ]{0,60}-----")
END = "-----END "
BODY = re.compile(r"(?:(?:\s|\\[nrt]|[\"'+,]){1,40}(?:[A-Za-z0-9+/=]{20,}|[A-Za-z-]{2,20}: [^\n]{0,80}))*")
MOST_BODY = 20_000
LEAST_BODY = 40
"""Fewest characters of a key after its header; code that only names the header has fewer."""


def find(text: str) -> Iterator[Span]:
    """Yield the keys in a text."""
    yield from _blocks(text)
    for word in LONG_WORD.finditer(text):
        yield from _in_word(text, word.start(), word.end())
    if "access_token$" in text:
        for match in PAYPAL.finditer(text):
            yield Span(match.start(), match.end(), "key")
    if "https://" in text:
        for match in WEBHOOK.finditer(text):
            yield Span(match.start(), match.end(), "key")


def _in_word(text: str, start: int, stop: int) -> Iterator[Span]:
    for match in FORM.finditer(text, start, stop):
        if match["fixed"] or has_random_run(match[0], length=10) or is_high_entropy(SEPARATORS.sub("", match[0])):
            yield Span(match.start(), match.end(), "key")
    word = text[start:stop]
    for pattern, hint in detect_secrets_forms():
        if hint in word:
            for match in pattern.finditer(text, start, min(stop, start + 4096)):
                if (
                    not text[match.start() - 1 : match.start()].isalnum()
                    and not text[match.end() : match.end() + 1].isalnum()
                ):
                    yield Span(match.start(), match.end(), "key")
    yield from _random_beside_its_name(text, start, stop)


def _random_beside_its_name(text: str, start: int, stop: int) -> Iterator[Span]:
    """Yield a random word that the words before it call a key."""
    word = text[start:stop]
    if (
        stop - start > 512
        or not (is_high_entropy(word) or HEXADECIMAL.fullmatch(word))
        or "://" in word
        or word.count("/") > 2
        or ":" in word
    ):
        return
    # Words before another long word or a placeholder belong to that one.
    before = OTHER_WORD.split(text[max(0, start - CONTEXT_CHARACTERS) : start].rpartition("\n")[2])[-1]
    if CONTEXT.search(before) and not NO_CONTEXT.search(before):
        yield Span(start, stop, "key")


@cache
def detect_secrets_forms() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return the patterns of detect-secrets, each with a substring that all of its matches contain.

    Its other plugins are not used: keywords and entropy alone would change code; basic_auth and private_key are covered here.
    """
    from detect_secrets.plugins.artifactory import ArtifactoryDetector
    from detect_secrets.plugins.aws import AWSKeyDetector
    from detect_secrets.plugins.openai import OpenAIDetector
    from detect_secrets.plugins.square_oauth import SquareOAuthDetector
    from detect_secrets.plugins.stripe import StripeDetector

    return tuple(
        (pattern, hint)
        for plugin, hint in (
            (AWSKeyDetector, "A3T"),
            (OpenAIDetector, "T3BlbkFJ"),
            (SquareOAuthDetector, "sq0csp"),
            (StripeDetector, "k_live_"),
            (ArtifactoryDetector, "AKC"),
        )
        for pattern in plugin.denylist[:1]
    )


def _blocks(text: str) -> Iterator[Span]:
    """Yield private keys in PEM, complete or cut off, in linear time however many headers there are."""
    place, end = 0, -1
    while (start := text.find(BEGIN, place)) >= 0:
        place = start + len(BEGIN)
        header = HEADER.match(text, start)
        if header is None:
            continue
        if 0 <= end < header.end() or end == -1:
            end = text.find(END, header.end())
            end = len(text) + 1 if end < 0 else end
        body = BODY.match(text, header.end())
        assert body is not None, "it may be empty"
        stop = body.end()
        if end <= min(len(text), stop + MOST_BODY) and text.find(BEGIN, header.end(), end) < 0:
            footer = FOOTER.match(text, end)
            stop = footer.end() if footer else stop
        if (
            sum(map(str.isalnum, text[header.end() : header.end() + 400])) >= LEAST_BODY
            and stop - header.end() >= LEAST_BODY
        ):
            place = stop
            yield Span(start, stop, "key")
