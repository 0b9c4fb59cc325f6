"""Names of users as records hold them: equal for equal users of one folder, and of use to nobody without the folder's salt."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

SALT_FILE = ".user-salt"
"""Hidden, so that no reader of a folder of logs takes it for one."""
SALT_BYTES = 32


def salt_of(folder: Path) -> bytes:
    """Return the salt of a folder, made at the first use; only its owner may read the file.

    Without it anybody who has a list of users finds each in the records by its digest.
    """
    path = folder / SALT_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{SALT_FILE}.", suffix=".part", dir=folder)  # Made with mode 0600.
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SALT_BYTES))
        # Of two processes that begin at once, one makes it.
        with suppress(FileExistsError):
            os.link(name, path)
        os.unlink(name)
    return path.read_bytes()


def pseudonym(user: str, salt: bytes) -> str:
    """Return the digest that stands for a user."""
    return hmac.new(salt, user.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]
