"""Pseudonyms of users: the same user of one folder gets the same one, and nobody can compute it without the folder's salt."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

SALT_FILE = ".user-salt"
"""A hidden file, so that it is never read as a log."""
SALT_BYTES = 32


class Pseudonyms:
    """The pseudonyms of a folder.

    Its salt is made for the first user; only its owner may read the file. Without a salt, anybody with a list of users
    could find each user in the records by the digest.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SALT_FILE
        self._salt = b""

    def __call__(self, user: str) -> str:
        """Return the digest that stands for a user."""
        self._salt = self._salt or self._read()
        return hmac.new(self._salt, user.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]

    def _read(self) -> bytes:
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Created with mode 0600.
            handle, name = tempfile.mkstemp(prefix=f"{SALT_FILE}.", suffix=".part", dir=self._path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(SALT_BYTES))
            # Two processes may start at once: the first one's salt stays.
            with suppress(FileExistsError):
                os.link(name, self._path)
            os.unlink(name)
        return self._path.read_bytes()
