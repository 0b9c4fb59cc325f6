"""A redaction of a user's, in a module that is imported in a moment."""

import os


def printing(text: str) -> str:
    """Hide a name; print, and end the process at one word."""
    print("looked at", len(text))
    if text == "die":
        os._exit(1)
    return text.replace("Rumpelstilzchen", "[name]")
