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


class Pseudonyms:
    """The pseudonyms of a folder.

    Its salt is made when the first user is named; only its owner may read the file. Without a salt anybody who has a list of users
    would find each in the records by its digest.
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
            # Made with mode 0600.
            handle, name = tempfile.mkstemp(prefix=f"{SALT_FILE}.", suffix=".part", dir=self._path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(SALT_BYTES))
            # Of two processes that begin at once, one makes it.
            with suppress(FileExistsError):
                os.link(name, self._path)
            os.unlink(name)
        return self._path.read_bytes()
