"""Reads the files that `same_numbers.py` compares, without values that differ in every run, and finds their differences."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

TIMES = [
    "at",
    "date",
    "seconds",
    "prefill_seconds",
    "draft_seconds",
    "verify_seconds",
    "step_ms",
    "fetch_ms",
    "draw_ms",
]
TIMES += ["target_ms", "forward_ms", "backward_ms", "optimizer_ms", "validation_ms", "checkpoint_ms", "mfu"]
SPEEDS = ["tokens/s", "speed-up", "tokens_per_second", "speedup", "speed"]
SPEEDS += ["plain_tokens_per_second", "transformers_generate_tokens_per_second"]
MACHINE = ["provenance", "reason", "user", "inode", "states", "name_or_path"]
"""`reason` is a sentence. Each run hashes `user` with a salt of its own; `inode`, `states` and `name_or_path` name files of the checkout."""
IGNORED = {*TIMES, *SPEEDS, *MACHINE}
"""Columns of metrics.csv and of printed tables, and keys of JSON, that are not compared."""
Names = dict[str, str | None]
RENAMED: Names = {"lane": "route", "law": "distribution"}
"""Column or key of BEFORE -> its name in AFTER; None: AFTER leaves it out on purpose."""
RENAMED_PATHS: Names = {}
"""The same for files and folders, for each part of a path separately."""
SUFFIXES = {
    ".safetensors": "tensors",
    ".csv": "metrics",
    ".json": "json",
    ".jsonl": "data",
    ".npy": "data",
    ".gguf": "data",
}
"""Kind of output by file ending; files with other endings are not read."""


class Absent:
    """The value of a name on the side that does not have it."""

    def __str__(self) -> str:
        return "(absent)"


ABSENT = Absent()


def contents(folder: Path, names: Names, paths: Names) -> dict[tuple[str, str], Any]:
    """Return the contents of a work folder that are compared, by kind and relative path, under their new names."""
    found: dict[tuple[str, str], Any] = {}
    for one in json.loads((folder / "log.json").read_text(encoding="utf-8")):
        words = " ".join(one["command"])
        found["run", words] = f"exit code {one['code']}: {one['error']}" if one["code"] else "done"
        if one["command"][0] == "fit":
            found["tables", words] = clean(tables(one["stdout"]), names)
    for path in sorted(folder.rglob("*")):
        parts = [paths.get(part, part) for part in path.relative_to(folder).parts]
        if path.suffix in SUFFIXES and path.name not in ("log.json", "provenance.json") and None not in parts:
            special = {"eval.json": "eval", "metrics.jsonl": "metrics", "history.jsonl": "metrics"}
            content = read(path) if path.name == "tokenizer.json" else clean(read(path), names)  # its keys are tokens
            kind = "exports" if parts[0] == "exports" else special.get(path.name, SUFFIXES[path.suffix])
            found[kind, "/".join(map(str, parts))] = content
    return found


def read(path: Path) -> Any:
    """Return a file as dicts, lists, numbers and tensors."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return {one.name: torch.from_numpy(np.array(one.data)) for one in GGUFReader(path).tensors}
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def tables(stdout: str) -> dict[str, dict[str, str]]:
    """Return the rows of printed tables by their first cells; a row that two tables share has the columns of both.

    A line of dashes shows where the columns are; a table ends where a line does not keep them apart.
    """
    rows: dict[str, dict[str, str]] = {}
    spans: dict[str, slice] = {}
    lines = stdout.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.fullmatch("-+( +-+)*", line):
            spans = {above[slice(*one.span())].strip(): slice(*one.span()) for one in re.finditer("-+", line)}
            continue
        gaps = [line[one.stop : other.start] for one, other in pairwise(spans.values())]
        if not line.strip() or any(gap.strip() for gap in gaps):
            spans = {}
        if spans:
            row = {name: line[span].strip() for name, span in spans.items()}
            key = " ".join(row[name] for name in ("temperature", "drafter") if name in row) or next(iter(row.values()))
            rows.setdefault(key, {}).update(row)
    return rows


def clean(found: Any, names: Names) -> Any:
    """Return content without the ignored keys, under the new names of the others."""
    if isinstance(found, list):
        return [clean(one, names) for one in found]
    if not isinstance(found, dict):
        return found
    kept = {key: names.get(key, key) for key in found if key not in IGNORED}
    return {name: clean(found[key], names) for key, name in kept.items() if name is not None}


def differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each difference and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{name}: {key}")
    elif isinstance(a, list) and isinstance(b, list):
        for at, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from differences(one, other, f"{name}[{at}]")
        if len(a) != len(b):
            yield f"{name}: length", len(a), len(b)
    elif isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape):
        flat = a.reshape(-1), b.reshape(-1)
        unequal = (_bytes(a) != _bytes(b)).view(a.numel(), -1).any(dim=1) if a.numel() else torch.zeros(1)
        if unequal.any():
            at = int(unequal.int().argmax())
            yield f"{name}[{at}]", flat[0][at].item(), flat[1][at].item()
    elif type(a) is not type(b) or isinstance(a, Tensor) or (a != b and not (a != a and b != b)):
        yield name, a, b


def match_moved(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Give files of `one` the path at which `other` has the same content; return the moves."""
    new: dict[tuple[str, str], list[str]] = {}
    for path in sorted({*other} - {*one}):
        new.setdefault((Path(path).suffix, _digest(other[path])), []).append(path)
    moved = []
    for path in sorted({*one} - {*other}):
        if found := new.get((Path(path).suffix, _digest(one[path]))):
            moved.append(f"{path} -> {found[0]}")
            one[found.pop(0)] = one.pop(path)
    return moved


def short(value: Any) -> str:
    """Return a value in a few words."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    text = f"{len(value)} entries" if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _digest(found: Any) -> str:
    def spelled(tensor: Tensor) -> list[Any]:
        return [str(tensor.dtype), tensor.shape, hashlib.sha256(_bytes(tensor).numpy().tobytes()).hexdigest()]

    return hashlib.sha256(json.dumps(found, sort_keys=True, default=spelled).encode()).hexdigest()
