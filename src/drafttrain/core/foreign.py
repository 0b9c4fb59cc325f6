"""Checks of untrusted model folders: refuses files that could hang a reader, fill the memory or link elsewhere.

Every reader of such a folder calls `check_folder` before other libraries see it, and reads JSON with `read_json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.printable import shown

READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".bin", ".pt", ".gguf")
"""Suffixes of files that some reader opens."""

MAX_BYTES = 64 << 20
"""Limit of a JSON file that is read whole. The largest known (tokenizer_config.json with added tokens) has a few MB."""
MAX_DEPTH = 64
MAX_TEMPLATE = 256 << 10
"""Limit of a chat template: longer ones take seconds to compile. Known ones have tens of kB."""

CONFIGURATIONS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", "chat_template.json", "drafttrain.json"),
)
"""JSON files that loaders read whole. Other JSON files in a folder are not checked."""

MAPPINGS = ("text_config", "quantization_config", "auto_map", "generation_config")
ABOVE_ZERO = (
    "hidden_size",
    "n_embd",
    "d_model",
    "num_attention_heads",
    "n_head",
    "vocab_size",
    "num_hidden_layers",
    "n_layer",
)
FINITE = ("eps", "epsilon", "theta", "factor", "scale", "scaling", "multiplier", "scalar")
"""Suffixes of fields that must be finite factors. Other numbers, such as times, may be infinite."""
NAMES = ("model_type", "hidden_act", "hidden_activation", "activation_function", "dtype", "torch_dtype", "kind")
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4096),
    **dict.fromkeys(("medusa_num_heads", "medusa_num_layers", "num_heads", "num_draft_tokens", "n_head"), 4096),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts"), 1 << 16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim", "lora_rank", "r"), 1 << 20),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "vocab_size", "draft_vocab_size", "truncated_vocab_size"), 1 << 26
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1 << 31),
}
"""Limits of sizes by which memory is allocated before any weight is read; each is far above all known values."""


def check_folder(folder: Path) -> None:
    """Refuse a folder whose files cannot be read in bounded time and memory, or whose configuration has wrong types.

    Raises:
        CheckpointError: There is no such folder; or lists every problem of its files.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    templates = folder / "additional_chat_templates"
    paths = [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    problems = [problem for path in sorted(paths) for problem in _problems(path)]
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: cannot be read", *on_one_screen(problems)]))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        CheckpointError: It is missing, too large, nested too deeply, or not a JSON object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes, at most {MAX_BYTES:,} are read")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} levels") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    if _deeper_than(value, MAX_DEPTH):
        raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} levels")
    return value


def own_files(folder: Path, *, suffixes: Collection[str] | None = None) -> list[Path]:
    """Return the files and folders under a folder, before it is copied; refuse links that lead out of it.

    Links of a hub snapshot into its cache's `blobs` are allowed.

    Args:
        suffixes: Suffixes of the files to check; None: all.

    Raises:
        CheckpointError: Lists every link that leads elsewhere, and every file that is not a regular one.
    """
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    paths = sorted(folder.rglob("*"))
    problems = []
    for path in paths:
        if suffixes is not None and path.suffix not in suffixes and not path.is_dir():
            continue
        try:
            real = path.resolve()
        except RuntimeError:
            problems.append(f"{path.relative_to(folder)}: a link to itself")
            continue
        if not any(real.is_relative_to(root) for root in roots):
            problems.append(f"{path.relative_to(folder)}: a link to {real}, outside the folder")
        elif not (path.is_file() or path.is_dir()):
            problems.append(f"{path.relative_to(folder)}: not a regular file")
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: not copied", *on_one_screen(problems)]))
    return paths


def field_problems(config: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """Yield one line for every field of a model's configuration with a type or size that loaders do not expect."""
    for key, value in config.items():
        where = f"{prefix}{key}"
        if key in NAMES and not isinstance(value, str | None):
            yield f"{where} must be a name, got {shown(value)}"
        elif key.endswith(("_eps", "_epsilon", "rope_theta")) and not _are_numbers(value):
            yield f"{where} must be a number, got {shown(value)}"
        elif key in MAPPINGS and not isinstance(value, Mapping | None):
            yield f"{where} must be a mapping, got {shown(value)}"
        elif isinstance(value, float) and not (
            math.isfinite(value) or (math.isinf(value) and not key.endswith(FINITE))
        ):
            yield f"{where} must be a finite number, got {value}"
        elif key == "architectures" and not _is_names(value):
            yield f"{where} must be a list of names, got {shown(value)}"
        elif key in LARGEST:
            numbers = value if isinstance(value, list) else [value]
            if any(type(number) not in (int, type(None)) for number in numbers):
                yield f"{where} must be a whole number, got {shown(value)}"
            elif any(number is not None and number > LARGEST[key] for number in numbers):
                yield f"{where} is {shown(value)}, at most {LARGEST[key]} is read"
            elif key in ABOVE_ZERO and any(number is not None and number < 1 for number in numbers):
                yield f"{where} must be 1 or more, got {shown(value)}"
        elif key.endswith(("config", "rope_parameters", "rope_scaling")) and isinstance(value, Mapping):
            yield from field_problems(value, prefix=f"{where}.")


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[str], *, path: Path) -> Any:
    """Return a value of a configuration file; the first that is allowed if the file does not have the key.

    Raises:
        CheckpointError: It is another value.
    """
    found = config.get(key, allowed[0])
    if found not in allowed:
        raise CheckpointError(f"{path}: {key} must be {' or '.join(allowed)}, got {found!r:.60}")
    return found


def _problems(path: Path) -> Iterator[str]:
    if path.suffix not in READ or path.is_dir():
        return
    if not path.is_file():
        yield f"{path.name}: not a regular file"
    elif path.suffix == ".jinja" and path.stat().st_size > MAX_TEMPLATE:
        yield f"{path.name}: {path.stat().st_size:,} bytes, of a chat template at most {MAX_TEMPLATE:,} are read"
    elif path.name in CONFIGURATIONS:
        try:
            value = read_json(path)
        except CheckpointError as error:
            yield str(error).removeprefix(f"{path.parent}/")
            return
        if _template_bytes(value.get("chat_template")) > MAX_TEMPLATE:
            yield f"{path.name}: chat_template: at most {MAX_TEMPLATE:,} characters are read"
        if type(value.get("model_max_length")) not in (int, float, type(None)):
            yield f"{path.name}: model_max_length must be a number, got {shown(value['model_max_length'])}"
        if path.name == "config.json":
            yield from (f"config.json: {problem}" for problem in field_problems(value))


def _template_bytes(given: Any) -> int:
    """Return the length of a template, or of the longest of several named ones."""
    held = [
        one.get("template") if isinstance(one, dict) else one for one in (given if isinstance(given, list) else [given])
    ]
    held += list(given.values()) if isinstance(given, dict) else []
    return max((len(one) for one in held if isinstance(one, str)), default=0)


def _are_numbers(value: Any) -> bool:
    """Return whether a value is a number or None, or a list of these (one per layer)."""
    return all(type(one) in (int, float, type(None)) for one in (value if isinstance(value, list) else [value]))


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            part
            for held in level
            if isinstance(held, dict | list)
            for part in (held.values() if isinstance(held, dict) else held)
        ]
    return any(isinstance(held, dict | list) for held in level)


def on_one_screen(problems: Sequence[str]) -> list[str]:
    """Return the first 20 lines of a message, long ones shortened: they contain untrusted names and values."""
    lines = [line if len(line) <= 800 else f"{line[:800]}..." for line in problems[:20]]
    return lines + ([f"and {len(problems) - len(lines)} more"] if len(problems) > len(lines) else [])
