"""Escapes text from outside (names, paths, outputs) so that terminals, logs and files can show it."""

import unicodedata

KEPT = "\n\t"
UNPRINTABLE = ("Cc", "Cs")
"""Control characters, which a terminal would execute, and halves of surrogate pairs, which cannot be encoded."""


def printable(text: str, *, encoding: str = "utf-8") -> str:
    """Return text with escapes such as `\\x1b` and `\\udcff` for characters that cannot be shown.

    Args:
        encoding: The output's encoding. Characters that it lacks are escaped too.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(
        character.encode("unicode_escape").decode()
        if character not in KEPT and unicodedata.category(character) in UNPRINTABLE
        else character
        for character in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def shortened(text: str, *, length: int = 80) -> str:
    """Return a text as a message shows it: one line of at most `length` characters."""
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[: length + 1])
    return line if len(text) <= length else f"{line[:length]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """Return a value as a message shows it: its repr, shortened."""
    return shortened(repr(value))
