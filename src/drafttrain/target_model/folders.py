"""Model folders: found by name, fetched from the hub, and fingerprinted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from drafttrain.core import digests
from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.folder_checks import check_model_files, no_folder
from drafttrain.target_model.gguf_folder import SUFFIX, folder_of_gguf
from drafttrain.target_model.known_targets import KNOWN, fetch, fetched_file, known_target

BUILTIN = "builtin:"
PUBLISHED = Path(__file__).parent / "published"
"""The sizes in the config.json of the models that bundled recipes name, by hub id: a plan then needs no hub.

As published by their makers on the hub; `tests/target_model/test_published.py` compares the weights with the published numbers.
"""
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""Files that are fetched from a hub model."""


def stands_for_folder(name: str) -> bool:
    """Return whether a name is short for a local folder elsewhere: of a builtin or known model, or of a GGUF file."""
    return name.startswith((BUILTIN, KNOWN)) or name.endswith(SUFFIX)


def resolve_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a builtin name, a path, or a known name or hub id (which are fetched).

    The folder of a GGUF file is made when it is first needed.

    Raises:
        CheckpointError: There is no such folder, and no such id on the hub or in its cache.
    """
    if name.startswith(BUILTIN):
        folder = Path(str(resources.files("drafttrain") / "builtin" / name.removeprefix(BUILTIN)))
        if folder.is_dir():
            return folder
        known = sorted(f"{BUILTIN}{path.name}" for path in folder.parent.glob("*") if path.is_dir())
        raise CheckpointError(f"{name}: no such builtin. Available: {', '.join(known) or 'none'}")
    if name.startswith(KNOWN):
        return folder_of_gguf(fetch(known_target(name.removeprefix(KNOWN))))
    folder = Path(os.path.expanduser(name))  # an unknown user leaves the name as it is
    if folder.is_dir():
        return folder
    if folder.suffix == SUFFIX and folder.is_file():
        return folder_of_gguf(folder)
    if reason := no_folder(name):
        raise CheckpointError(f"{name}: {reason}")
    if folder.suffix == SUFFIX:
        raise CheckpointError(f"{name}: no such file")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder (a hub id has the form owner/name)")
    return _fetched(name, HUB_PATTERNS, revision=revision)


def config_folder(name: str, *, revision: str | None = None) -> Path:
    """Return a local folder with the config.json of a name: of a hub id without one here, only that file is fetched.

    Raises:
        CheckpointError: There is no such folder, or it has no config.json.
    """
    hub_id = known_target(name.removeprefix(KNOWN)).hub_id if name.startswith(KNOWN) else name
    published = PUBLISHED / hub_id.replace("/", "--") / "config.json"
    if revision is None and not Path(name).exists() and published.is_file():
        return published.parent
    folder = (
        _fetched(name, ("config.json",), revision=revision, instead="; a folder with its config.json alone is enough")
        if _may_be_on_hub(name)
        else cached_folder(name, revision=revision)
    )
    if folder is None:
        raise CheckpointError(f"{name}: not on this machine yet: drafttrain target fetch {name.removeprefix(KNOWN)}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json here: not a model folder")
    return folder


def _fetched(name: str, patterns: Sequence[str], *, revision: str | None, instead: str = "") -> Path:
    """Return the folder of a hub id with the files of these patterns.

    A name that begins with a folder that is here is taken for a path, unless it is in the hub's cache.

    Args:
        instead: What to give where the hub cannot be reached, for the error.

    Raises:
        CheckpointError: It cannot be fetched, or the name is a path.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    owner = Path(name).parts[0]
    if Path(owner).is_dir() and _in_cache(name, patterns, revision=revision) is None:
        raise CheckpointError(
            f"{name}: no such folder in {owner}, which is here, so this is no hub id (to fetch {name} from the hub, run the command "
            f"where there is no {owner})"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: not a local folder, and fetching it from the hub failed ({type(error).__name__}){instead}"
        ) from error


def _may_be_on_hub(name: str) -> bool:
    """Return whether a name may be a hub id: it is not short for a folder, and not a path."""
    local = stands_for_folder(name) or name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    return not local


def cached_folder(name: str, *, revision: str | None = None) -> Path | None:
    """Return the local folder of a name without fetching anything; None: a hub id or known name that is not on this machine.

    Raises:
        CheckpointError: There is no such folder, and the name is not a hub id.
    """
    if name.startswith(KNOWN) and not fetched_file(known_target(name.removeprefix(KNOWN))).exists():
        return None
    if not _may_be_on_hub(name):
        return resolve_folder(name)
    folder = _in_cache(name, HUB_PATTERNS, revision=revision)
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _in_cache(name: str, patterns: Sequence[str], *, revision: str | None) -> Path | None:
    """Return the folder of a hub id in the hub's cache; None: it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fingerprint_of(folder: Path) -> str:
    """Return a short digest of a model folder: its configuration and its weights (sampled as in `core.digests`)."""
    check_model_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        digest.update(f"{path.name}:{digests.weights_digest(path)}\n".encode())
    return digest.hexdigest()[:16]
