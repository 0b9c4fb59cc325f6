"""The bytes that each token of a tokenizer spells in the middle of a text.

Tokenizers write the same text in different ways: byte-level BPE gives each byte a letter (a space is `Ġ`), SentencePiece writes a
space as `▁` and a lone byte as `<0x0A>`. In bytes, equal tokens are equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from drafttrain.core.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's token of a lone byte."""

SPELLED = ("Replace", "Metaspace", "ByteFallback", "ByteLevel")
"""Steps of a decoder in tokenizer.json that change what a token spells."""
AT_EDGES = ("Fuse", "Strip")
"""Steps that act on the whole text only."""


def token_bytes(tokenizer: Any, *, name: str) -> dict[int, bytes]:
    """Return the bytes of each token by id; tokens that control the text (`control_ids`) are left out.

    Args:
        name: Of the tokenizer, for the error.

    Raises:
        CheckpointError: It has no tokenizer.json, or its decoder has a step whose effect on a token is not known here.
    """
    steps = list(_steps(_decoder(tokenizer, name=name)))
    kinds = [str(step["type"]) for step in steps]
    if not set(kinds) & set(SPELLED) or set(kinds) - {*SPELLED, *AT_EDGES}:
        raise CheckpointError(
            f"{name}: its tokenizer's decoder has the steps {', '.join(kinds) or 'none'}: what its tokens spell is known for byte-level "
            "BPE and for SentencePiece only"
        )
    control = control_ids(tokenizer)
    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    return {
        id: added[id].encode() if id in added else _spelled(token, steps)
        for token, id in tokenizer.get_vocab().items()
        if id not in control
    }


def is_lone_byte(token: str) -> bool:
    """Return whether a token is SentencePiece's for a lone byte, beside which the same text may have a token of its own."""
    return BYTE_TOKEN.fullmatch(token) is not None


def control_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, which spell no text."""
    marked = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*map(int, tokenizer.all_special_ids), *marked}


def _decoder(tokenizer: Any, *, name: str) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{name}: its tokenizer has no tokenizer.json, from which it is known what its tokens spell"
        )
    found: Mapping[str, Any] = json.loads(backend.to_str())["decoder"] or {}
    return found


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _spelled(token: str, steps: list[Mapping[str, Any]]) -> bytes:
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            return b"".join(BYTE_OF_LETTER.get(letter, letter.encode()) for letter in token)
        if kind == "ByteFallback" and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
    return token.encode()


def _byte_of_letter() -> dict[str, bytes]:
    """Return the byte of each letter of byte-level BPE: printable bytes are their own letters, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + number): bytes([byte]) for number, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()
