"""A GGUF file as a model folder, made once in the user's cache: everything else reads it like any other folder.

The weights are stored in float32, which holds what dequantizing gives exactly: the folder is the model that the file holds,
not the one that it was quantized from.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.console import say
from drafttrain.core.digests import text_digest
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside, lock, user_cache, write_json
from drafttrain.core.foreign import read_json
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.gguf_checks import INSTEAD, readable_header
from drafttrain.target_model.gguf_config import FREQUENCIES, gguf_config
from drafttrain.target_model.gguf_header import GgufHeader
from drafttrain.target_model.gguf_splitting import SAME, SPLITTINGS, splitting_named

SUFFIX = ".gguf"
ROOT_VARIABLE = "DRAFTTRAIN_TARGETS"
MADE_FROM = "made_from_gguf.json"
"""In a made folder: which file it was made from. Written last."""
VERSION = 1
"""Raised when the same file gives another folder."""

ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
TYPE_BYTES = 4
SPARE_BYTES = 64 << 20


def targets_root() -> Path:
    """Return the folder of all models that are made or fetched."""
    given = os.environ.get(ROOT_VARIABLE)
    return Path(given).expanduser() if given else user_cache() / "targets"


def folder_of_gguf(path: Path) -> Path:
    """Return the model folder of a file; the first call makes it.

    Raises:
        CheckpointError: Naming the file, and why it cannot be read.
    """
    digest = text_digest(path) if path.is_file() else ""
    folder = targets_root() / f"{path.stem}-{digest[:12]}-v{VERSION}"
    if not (folder / MADE_FROM).exists():
        header = readable_header(path)
        with _alone(folder):
            if not (folder / MADE_FROM).exists():
                for left in folder.parent.glob(f".{folder.name}.*.part"):
                    shutil.rmtree(left, ignore_errors=True)
                _make(header, folder, digest)
    if gguf_file_of(folder) != path.resolve():
        write_json(folder / MADE_FROM, {**read_json(folder / MADE_FROM), "file": str(path.resolve())})
    return folder


def gguf_file_of(folder: Path) -> Path | None:
    """Return the file that a folder was made from; None: the folder was not made from one."""
    made = folder / MADE_FROM
    return Path(read_json(made)["file"]) if made.exists() else None


def no_tokenizer_in(folder: Path) -> str | None:
    """Return why a folder made from a GGUF file has no tokenizer, naming the file; None: it has one, or is another folder."""
    made = folder / MADE_FROM
    held = read_json(made) if made.exists() else {}
    return f"{held['file']}: {held['no_tokenizer']}" if held.get("no_tokenizer") else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this folder, and keep others waiting."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        lock(file.fileno(), wait=True)
        yield


def _make(header: GgufHeader, folder: Path, digest: str) -> None:
    size = header.num_values * TYPE_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < size + SPARE_BYTES:
        raise CheckpointError(
            f"{header.path}: its model folder needs {size / 1e9:.1f} GB in {folder.parent}, which has {free / 1e9:.1f} GB left: "
            f"free some, or set {ROOT_VARIABLE} to a folder on another disk"
        )
    say(f"{header.path}: making a model folder from it, once: {size / 1e9:.2f} GB (float32) in {folder}")
    began = time.monotonic()
    with folder_beside(folder) as temporary:
        model = _model(header)
        model.save_pretrained(temporary)
        _without_versions(temporary / "config.json")
        reason = _write_tokenizer(header, temporary)
        about = {"file": str(header.path.resolve()), "sha256": digest, "no_tokenizer": reason}
        write_json(temporary / MADE_FROM, about)
    say(f"{header.path}: done in {time.monotonic() - began:.0f} seconds")


def _model(header: GgufHeader) -> Any:
    """Return the model of a file in float32.

    Raises:
        CheckpointError: transformers cannot load it, or would load only a part of it.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.quantization_config import GgufConfig

    path, config = header.path, gguf_config(header)
    try:
        # A bar of its own on stderr cannot be switched off.
        with torch.random.fork_rng(devices=[]), redirect_stderr(io.StringIO()):
            result: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except Exception as error:  # broken files and third-party code raise anything
        raise CheckpointError(f"{path}: transformers cannot load it: {in_one_line(error)}") from error
    loaded, report = result
    _check_all_loaded(header, loaded, report)
    model = _plain(loaded)
    ends = [header.settings[key] for key in ENDS if key in header.settings]
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)) or None,
        pad_token_id=config.pad_token_id,
    )
    return model


def _check_all_loaded(header: GgufHeader, model: Any, report: Any) -> None:
    """Refuse a model in which weights are missing, or from which tensors of the file were left out."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{header.path}: {len(missing)} weights are missing in it: {', '.join(missing[:5])}: {INSTEAD}"
        )
    held = sum(tensor.num_values for tensor in header.tensors if tensor.name != FREQUENCIES)
    loaded = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if held != sum(loaded.values()):
        raise CheckpointError(
            f"{header.path}: holds {held:,} weights, but transformers' {type(model).__name__} reads {sum(loaded.values()):,} of "
            f"them, so it would be another model: {INSTEAD}"
        )


def _plain(loaded: Any) -> Any:
    """Return the same weights in a model that transformers agrees to save."""
    fields = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    config = type(loaded.config).from_dict(fields)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = type(loaded)._from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    return model


def _without_versions(path: Path) -> None:
    """Remove what depends on the release of transformers, so that a file has one fingerprint."""
    held = read_json(path)
    write_json(path, {k: v for k, v in held.items() if k not in ("transformers_version", "_model_name_or_path")})


def _write_tokenizer(header: GgufHeader, folder: Path) -> str | None:
    """Write the tokenizer of a file; return why there is none, which matters only without `target.tokenizer`."""
    kind, way = (header.settings.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind in (None, "none", "no_vocab"):
        return "has no tokenizer in it: set target.tokenizer to the folder or hub id of one"
    splitting = splitting_named(way) if kind == "gpt2" else None
    if kind == "gpt2" and splitting is None:
        known = ", ".join(sorted([*SAME, *(one.name for one in SPLITTINGS.values())]))
        return (
            f"its tokenizer splits text in a way that is not known here (tokenizer.ggml.pre: {way}; known: {known}): set "
            "target.tokenizer to the folder or hub id of the model's tokenizer"
        )
    try:
        _saved_tokenizer(header, folder, starts=splitting is not None and splitting[1].ignore_merges)
    except Exception as error:  # whatever the reader raises for broken vocabularies
        return f"transformers cannot read its tokenizer: {in_one_line(error)}: set target.tokenizer"
    if splitting is not None:
        _set_splitting(folder / "tokenizer.json", *splitting)
    return None


def _saved_tokenizer(header: GgufHeader, folder: Path, *, starts: bool) -> None:
    """Write the tokenizer of a file as transformers reads it.

    Args:
        starts: llama.cpp puts the token of the beginning before texts if the file does not say.
    """
    from transformers import PreTrainedTokenizerFast

    path = header.path
    unsaid: dict[str, Any] = {"add_bos_token": True} if starts else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, **unsaid)
    tokenizer.save_pretrained(folder)


def _set_splitting(path: Path, pre_tokenizer: dict[str, Any], splitting: Any) -> None:
    """Set the way to split text: transformers ignores some of llama.cpp's names, and splits like GPT-2 then."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held["pre_tokenizer"] = pre_tokenizer
    held["model"]["ignore_merges"] = splitting.ignore_merges
    write_json(path, held)
