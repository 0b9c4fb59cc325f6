"""A redaction function of a user, in a module that imports quickly."""

import os
import time


def printing(text: str) -> str:
    """Hide a name and print. The text "die" ends the process, and "hang" never returns."""
    print("looked at", len(text))
    if text == "die":
        os._exit(1)
    while text == "hang":
        time.sleep(1)
    return text.replace("Rumpelstilzchen", "[name]")
