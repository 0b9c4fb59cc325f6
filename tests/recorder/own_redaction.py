"""A redaction of a user's, in a module that is imported in a moment."""

import os
import time


def printing(text: str) -> str:
    """Hide a name; print, and end the process at one word, or never come to an end at another."""
    print("looked at", len(text))
    if text == "die":
        os._exit(1)
    while text == "hang":
        time.sleep(1)
    return text.replace("Rumpelstilzchen", "[name]")
