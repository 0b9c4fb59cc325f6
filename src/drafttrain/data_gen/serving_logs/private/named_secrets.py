"""Secrets recognized by their names: `password: ...`, `client_secret=...`, headers, options, URL parameters, users with passwords.

Code often names secrets without holding one: a value counts only if it is a literal, not a type, path, call or placeholder.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from drafttrain.data_gen.serving_logs.private.randomness import has_random_run
from drafttrain.data_gen.serving_logs.private.spans import PLACEHOLDER, Span

PASSWORD = (
    r"passw(?:or)?d|passwort|passphrase|passcode|(?<=[a-z0-9][_-])pass|\b(?:pass|pw)(?=\\?[\"']?\s?[:=]\s?\\?[\"']?(?=[^\s\"']{0,64}[A-Za-z])[^\s\"']{0,64}[\d!@#$%^&*])|pwd|kennwort|geheimnis|contrase(?:ñ|n)a|clave"
    r"|mot[ _]de[ _]passe|senha|parola|wachtwoord|hasło|haslo|lösenord|losenord|şifre|sifre|пароль|密码|密碼|口令|パスワード|暗証番号|비밀번호"
    r"|\bpin(?:[ _-]?code)?\b"
)
TOKEN = (
    r"(?:api|access|auth|secret|private|account|signing|encryption|master|license|service|storage|consumer|client|app|application|shared[_-]?access"
    r"|subscription|admin|webhook|deploy|pre[_-]?shared|functions?|rapidapi)[ _-]?key|\bpsk\b|secret(?:[_-]?key[_-]?base)?|token|client[_-]?secret|credentials?|bearer|jwt|session[_-]?id|\bsid\b"
    r"|connect\.sid|signature|\bsig\b|nonce[_-]?secret"
)
NAME = rf"(?P<password>{PASSWORD})|(?P<token>{TOKEN})"
TYPE = r"(?:str|string|String|Optional\[str\]|str ?\| ?None|char ?\*|bytes|SecretStr|any)"
SEPARATOR = rf"(?:\s{{0,3}}:\s{{0,3}}{TYPE}\s{{0,3}}=(?!=)|\s{{0,3}}(?:=>|:=|=(?!=)|[:：＝])|\s?(?:是|为|為|は|は、|이?는)\s?)\s{{0,4}}"
ASSIGNED = re.compile(rf"(?i)(?:{NAME})\d?(?:\\?[\"'`\]]){{0,2}}(?P<separator>{SEPARATOR}|>(?=[^<>\s]{{3,200}}</))")
QUOTED = re.compile(r"[bruBRU]?(\\?[\"'`])([^\"'`\n\\]{1,1024}|(?:(?!\1)[^\n]){1,1024})(?:\1)")
BARE = re.compile(r"[^\s\"'`,;<>(){}\[\]|]{1,512}")
NEXT_PARAMETER = re.compile(r"&(?=[\w.-]{1,40}=)")
CJK = re.compile(r"[\u2e80-\uffef]")
IN_ELEMENT = re.compile(r"[^<>\s]{1,200}")
SPOKEN = re.compile(
    r"(?i)\b(?:passw(?:or)?d|passcode|passphrase|pin(?: code)?|passwort|kennwort|contrase(?:ñ|n)a|clave|mot de passe|senha|parola|password|wachtwoord|hasło"
    r"|lösenord|şifre(?:m|niz)?|пароль)(?: [^\W\d_]{1,16}){0,3}? (?:is|was|to|ist|lautet|auf|es|est|é|è|is:|to:|jest|to jest|är|—|-)[ :]{1,2}[\"'“„«`]?"
    r"(?P<value>[^\s\"'”“»`<>(){}]{4,128})"
)
BEARER = re.compile(
    r"(?i)\b(?:authorization|x-auth-token|x-api-key)\b\\?[\"']?\s{0,2}[:=]\s{0,2}\\?[\"']?(?:(?:bearer|basic|token|digest|key|apikey)\s{1,2})?"
    r"(?P<value>[A-Za-z0-9._~+/=:-]{8,4096})|\bbearer\s{1,2}(?P<bare>[A-Za-z0-9._~+/=-]{12,4096})"
)
COOKIE = re.compile(
    r"(?i)\b(?:set-)?cookie\\?[\"']?\s{0,2}:\s{0,2}\\?[\"']?(?P<value>[\w.-]{1,64}=[^\s\"'\\;]{6,2048}(?:; ?[\w.-]{1,64}=[^\s\"'\\;]{1,2048}){0,40})"
)
OPTION = re.compile(
    r"(?:(?<=\s)|^)(?:--[a-z-]{0,24}(?:password|passwd|pass|token|secret|api-?key|access-?key|secret-?key)[ =]\s{0,2}|-u\s{1,2}[^\s:$]{1,64}:|sshpass -p ?)"
    r"[\"']?(?P<value>[^\s\"'`<>(){}$-][^\s\"'`<>(){}]{3,256})"
)
COMMAND = re.compile(
    r"\b(?:(?:mysql\w{0,8}|mariadb\w{0,8}|7z[ar]?|rar|unrar)\b[^\n|&;<>\"'`]{0,120}? -p(?=[^\s-])|(?:docker|podman|helm|oc|az|cf|nerdctl|buildah|skopeo) login\b"
    r"[^\n|&;<>\"'`]{0,120}? -p ?|(?:ldap(?:search|add|modify|delete|passwd|whoami)|ipmitool|bind)\b[^\n|&;<>\"'`]{0,120}? -[wP] ?|redis-cli\b[^\n|&;<>\"'`]{0,120}? -a ?"
    r"|(?:unzip|zip|zipcloak|sqlcmd)\b[^\n|&;<>\"'`]{0,120}? -P ?|smbclient\b[^\n|&;<>\"'`]{0,120}? -U ?[^\s%]{1,64}%|\bpass:)"
    r"[\"']?(?P<value>[^\s\"'`<>(){}$-][^\s\"'`<>(){}]{3,256})"
)
"""Commands whose short password option means a port or a path in other commands."""
CODES = re.compile(
    r"(?i)\b(?:cvv2?|cvc2?|otp|one-time (?:code|password|passcode)|(?:verification|security|2fa|mfa|confirmation) code)\b(?: (?:code|is|was|number)){0,2}\s?[:=#]?\s?"
    r"(?P<value>\d{3,8})(?!\w|\.\d)"
)
PHRASE = re.compile(
    r"(?i)\b(?:seed(?: phrase|phrase)|mnemonic(?: phrase)?|recovery (?:phrase|words)|secret phrase)\b[^\n\w]{0,6}(?:is |was )?[\"'`:= ]{0,4}(?P<value>(?:[a-z]{3,8} ){11,23}[a-z]{3,8})\b"
)
"""12 to 24 words from which the keys of a wallet are derived (BIP 39)."""
LOGIN_IN_BASE64 = re.compile(
    r"(?i)\b_?auth\\?[\"']?\s?[:=]\s?\\?[\"']?(?P<value>[A-Za-z0-9+/]{8,512}={0,2})(?![A-Za-z0-9+/=])"
)
HEXADECIMAL_KEY = re.compile(
    r"(?i)(?:private|secret|signing|encryption|master)[ _-]?key\b[^\n]{0,12}?\b(?P<value>0x[0-9a-f]{64})\b"
)
PARAMETER = re.compile(r"[?&](?:amp;)?(?P<name>[A-Za-z][\w.-]{0,40})=(?P<value>[^&\s\"'`<>#()\\]{4,4096})")
SIGNED = re.compile(
    r"(?i)(?:sig|signature|x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|access_?token|id_?token|refresh_?token"
    r"|auth(?:_?token)?|token|api_?key|key|secret|client_?secret|code|session(?:_?id)?|sid|jwt|password|passwd|pwd|pass|hmac|policy|awsaccesskeyid"
    r"|subscription-key|ticket|otp|assertion|state_token)"
)
LOGIN = re.compile(r"://(?P<user>[^\s/:@\"'`<>{}$]{0,128}):(?P<password>[^\s/\"'`<>{}]{1,256})@(?=[\w\[])")
LOGIN_TOKEN = re.compile(r"://(?P<token>[A-Za-z0-9_-]{16,256})@(?=[\w\[])")
JUDGED = 128
IDENTIFIERS = re.compile(r"[A-Za-z_$@&*][\w$]*(?:(?:\.|->|::|\?\.|/)[A-Za-z_]\w*)*")
ORDINARY = re.compile(
    r"(?i)(?:sha|md|utf|base|int|uint|float|double|str|arg|var|val|value|param|field|item|col|column|line|row|key|x|y|z|v|ver|version|rsa|aes|hs|rs|es|"
    r"bcrypt|argon|scrypt|pbkdf|level|step|test|user|idx|id|ctrl|f)[_-]?\d{1,4}"
)
WORDS = re.compile(
    r"(?i)(?:^|[^a-z])(?:your[a-z]*|my|the|example|placeholder|change|changeme|redacted|dummy|insert|replace|todo|enter|xxx+|none|null|nil|true|false|undefined"
    r"|required|optional|nullable|string|secret|password|passwd|token|key|hidden|masked|fake|min|max|empty|unset|default|env|value|here|some|any|text|field"
    r"|input|type|hash|hashed|encrypted|new|old|invalid|incorrect|wrong|forgot|reset|confirm)(?:$|[^a-z])"
)
MASKED = re.compile(r"(.)\1{2,}.{0,4}|[x*.•#_?-]+")
TOKEN_OF_TEXT = re.compile(
    r"(?i)(?:eos|bos|pad|unk|sep|cls|mask|next|prev(?:ious)?|num|max|min|stop|image|start|end|last|first|total|prompt|completion|special|draft|sub|new|"
    r"current|cur|bonus|sampled|input|output|of)[ _-]?\Z"
)


def find(text: str) -> Iterator[Span]:
    """Yield the named secrets in a text."""
    for match in ASSIGNED.finditer(text):
        yield from _assigned(text, match)
    for match in SPOKEN.finditer(text):
        value = match["value"].rstrip(".,!?;:)")
        if _is_password(value, quoted=False, lenient=False):
            yield Span(match.start("value"), match.start("value") + len(value), "key")
    for match in BEARER.finditer(text):
        group = "value" if match["value"] else "bare"
        if has_random_run(match[group], length=8) or (group == "value" and match[group].endswith("=")):
            yield Span(match.start(group), match.end(group), "key")
    for match in COOKIE.finditer(text):
        yield Span(match.start("value"), match.end("value"), "key")
    for match in OPTION.finditer(text):
        value = match["value"]
        is_name = IDENTIFIERS.fullmatch(value) and not any(map(str.isdigit, value))
        if not is_name and not _is_placeholder(value) and not value.startswith("id="):
            yield Span(match.start("value"), match.end("value"), "key")
    for match in COMMAND.finditer(text):
        is_file = IDENTIFIERS.fullmatch(match["value"]) and "." in match["value"]
        if not is_file and not _is_placeholder(match["value"]) and not match["value"].isdigit():
            yield Span(match.start("value"), match.end("value"), "key")
    for pattern in (CODES, PHRASE, HEXADECIMAL_KEY):
        for match in pattern.finditer(text):
            yield Span(match.start("value"), match.end("value"), "key")
    for match in LOGIN_IN_BASE64.finditer(text):
        if _is_login(match["value"]):
            yield Span(match.start("value"), match.end("value"), "key")
    if "=" in text:
        yield from _parameters(text)
    if "://" in text:
        yield from _logins(text)


def is_named_secret(name: str, value: str) -> bool:
    """Return whether a value under a name, such as a JSON key, is a secret, in whatever form."""
    found = re.search(rf"(?i)(?:{NAME})\Z", name.replace("-", "_")) or SIGNED.fullmatch(name)
    if not found or not value.strip() or PLACEHOLDER.fullmatch(value) or TOKEN_OF_TEXT.search(name[: found.start()]):
        return False
    groups = found.groupdict()
    if groups.get("password"):
        return not _is_placeholder(value)
    return _is_token(value, quoted=True, lenient=True)


def _assigned(text: str, match: re.Match[str]) -> Iterator[Span]:
    start = match.end()
    is_password = match["password"] is not None
    if not is_password and TOKEN_OF_TEXT.search(text[max(0, match.start() - 12) : match.start()]):
        return
    if match["separator"] == ">":
        value = IN_ELEMENT.match(text, start)
        quoted = True
    else:
        value, quoted = QUOTED.match(text, start), True
        if value is None:
            value, quoted = BARE.match(text, start), False
    if value is None:
        return
    group = value.lastindex or 0
    words = value[group]
    if not quoted:
        if "!" <= words[0] <= "~":
            # Chinese and Japanese text has no spaces between words.
            words = CJK.split(words, maxsplit=1)[0]
        words = NEXT_PARAMETER.split(words, maxsplit=1)[0].rstrip(".,!?:" if not words.endswith("...") else "")
        if text[start + len(words) : start + len(words) + 1] in ("(", "[", "{", "<"):
            return
    name = match[0][: match[0].find(match["separator"])]
    lenient = (name.rstrip("\"'`]").isupper() and match["separator"] == "=") or text[
        max(0, match.start() - 1) : match.start()
    ] in ("?", "&", ";")
    judge = _is_password if is_password else _is_token
    # The first characters decide; the whole value is redacted.
    if words and judge(words[:JUDGED], quoted=quoted, lenient=lenient):
        yield Span(value.start(group), value.start(group) + len(words), "key")


def _is_password(value: str, *, quoted: bool, lenient: bool) -> bool:
    """Return whether a value named as a password is one, and not code, a type or a label."""
    if len(value) < (3 if quoted else 4) or _is_placeholder(value) or re.search(r"\s", value):
        return False
    letters, digits = any(map(str.isalpha, value)), any(map(str.isdigit, value))
    if not letters:
        return digits and (value.isdigit() or quoted)
    if quoted or lenient:
        return len(value) >= 4
    if IDENTIFIERS.fullmatch(value):
        plain = re.fullmatch(r"[A-Za-z0-9]+", value) is not None or (value.lower() != value and value.upper() != value)
        return digits and plain and "." not in value and not ORDINARY.fullmatch(value) and len(value) >= 6
    return digits or any(one in "!@#$%^&*~+?" for one in value)


def _is_token(value: str, *, quoted: bool, lenient: bool) -> bool:
    """Return whether a value named as a key or token is one."""
    if len(value) < 6 or value.startswith(("token_id:", "/", "./", "http", "@")) or re.search(r"\s", value):
        return False
    if re.fullmatch(r"[\d.,_-]+", value):
        return False
    # Paths and calls in code may hold digits; literals of keys are runs.
    is_literal = quoted and lenient and len(value) >= 8 and not IDENTIFIERS.fullmatch(value)
    return (is_literal or has_random_run(value, length=6 if lenient else 8)) and not _is_placeholder(value)


def _is_placeholder(value: str) -> bool:
    if value.startswith(("<", "${", "{{", "$(", "%(", "{", "[", "#{", "...", "…", "%s", "@{", "***")) or re.fullmatch(
        r"\$\w+|%\w+%", value
    ):
        return True
    if MASKED.fullmatch(value) or re.fullmatch(rf"(?i)(?:{NAME})s?", value):
        return True
    return (
        not any(map(str.isdigit, value))
        and WORDS.search(value[:40]) is not None
        and not has_random_run(value, length=16)
    )


def _parameters(text: str) -> Iterator[Span]:
    for match in PARAMETER.finditer(text):
        name, value = match["name"], match["value"]
        if not SIGNED.fullmatch(name) and not re.search(rf"(?i)(?:{NAME})\Z", name):
            continue
        secret = re.search(r"(?i)pass|pwd|secret", name) and not _is_placeholder(value)
        if secret or (
            len(value) >= 8 and has_random_run(value.replace("%", ""), length=8) and not _is_placeholder(value)
        ):
            yield Span(match.start("value"), match.end("value"), "key")


def _is_login(word: str) -> bool:
    """Return whether a base64 word is `user:password`, as in files of docker and npm."""
    try:
        held = base64.b64decode(word, validate=True).decode("utf-8")
    except ValueError:
        return False
    return held.isprintable() and ":" in held[1:-1]


def _logins(text: str) -> Iterator[Span]:
    for match in LOGIN.finditer(text):
        password = match["password"]
        if not _is_placeholder(password) and password.lower() not in (
            "pass",
            "pwd",
            "passwd",
            "password",
            "secret",
            "token",
        ):
            yield Span(match.start("user"), match.end("password"), "key")
    for match in LOGIN_TOKEN.finditer(text):
        if has_random_run(match["token"], length=10):
            yield Span(match.start("token"), match.end("token"), "key")
