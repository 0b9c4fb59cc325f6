"""Tokenizers: loading, fingerprints, and the check that a drafter has the same one as its target."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.gguf_folder import no_tokenizer_in
from drafttrain.target_model.settings import TargetSettings

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
    ),
    *("*.model", "chat_template.*", "additional_chat_templates/*.jinja"),
)


def load_target_tokenizer(settings: TargetSettings) -> Any:
    """Return the target's tokenizer without reading any weights."""
    return load_tokenizer(tokenizer_folder(settings), trust_remote_code=settings.trust_remote_code)


def tokenizer_folder(settings: TargetSettings) -> Path:
    """Return the folder of the target's tokenizer."""
    name = settings.tokenizer or settings.model
    assert name is not None, "TargetSettings.check asks for one of them"
    return resolve_folder(name, revision=settings.revision if settings.tokenizer is None else None)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder."""
    from transformers import AutoTokenizer

    check_folder(folder)
    if reason := no_tokenizer_in(folder):
        raise CheckpointError(reason)
    if not tokenizer_files(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer here (no tokenizer.json): give its folder (for a target: target.tokenizer)"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exceptions, and broken files raise anything
        raise CheckpointError(f"{folder}: cannot load the tokenizer: {in_one_line(error)}") from error


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that determine how text and chats become token ids."""
    return sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a short digest of the map from tokens to ids."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def num_ids(tokenizer: Any) -> int:
    """Return how many ids a tokenizer can produce: its largest id + 1."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_same_tokenizer(target_tokenizer: Any, drafter_tokenizer: Any, *, drafter: str, whose: str = "target") -> None:
    """Refuse a drafter whose tokenizer differs from the target's in any token.

    Args:
        whose: In the message: the target's, or that of another one.

    Raises:
        CheckpointError: Lists the first tokens that differ.
    """
    ours, theirs = target_tokenizer.get_vocab(), drafter_tokenizer.get_vocab()
    different = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, theirs.get(token)),
    )
    if different:
        shown = ", ".join(
            f"{t!r} ({whose} {ours.get(t, 'none')}, drafter {theirs.get(t, 'none')})" for t in different[:5]
        )
        raise CheckpointError(
            f"{drafter}: its tokenizer differs from the {whose}'s in {len(different)} of {len(ours)} tokens: {shown}. "
            f"Use a drafter with the same tokenizer as the {whose}, or for a causal_lm set drafter.tokenizer."
        )
