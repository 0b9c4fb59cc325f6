"""Outputs of an evaluation that has not finished: an interrupted one continues after the last prompts that all arms decoded.

They are stored in a folder of their own for everything that outputs and times depend on; any change makes another folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.device_time import Span
from drafttrain.core.digests import files_digest, text_digest
from drafttrain.core.files import write_json
from drafttrain.core.foreign import read_json
from drafttrain.core.generations import ForwardEvent, ForwardShape, Generation, Work
from drafttrain.core.provenance import provenance
from drafttrain.core.registry import components_of
from drafttrain.core.texts import Prompt
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.typed_json import from_json, to_json
from drafttrain.target_model import Target

DIGEST_CHARACTERS = 16


@dataclass(frozen=True)
class Event:
    """A `ForwardEvent` with its time as a number."""

    model: str
    shape: ForwardShape
    work: Work
    seconds: float
    prefill: bool
    plain_bytes: int

    @classmethod
    def of(cls, event: ForwardEvent) -> Event:
        """Return what is stored of a forward."""
        return cls(**{name: getattr(event, name) for name in cls.__dataclass_fields__})

    def forward_event(self) -> ForwardEvent:
        """Return the forward as the ledger holds it."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "seconds"}
        return ForwardEvent(**parts, span=Span.of(self.seconds))


@dataclass(frozen=True)
class DecodedByArm:
    """What one arm did with a group of prompts."""

    generations: Sequence[Generation]
    events: Sequence[Event]


@dataclass(frozen=True)
class DecodedGroup:
    """A group of prompts, decoded by all arms and by transformers' generate."""

    arms: Sequence[DecodedByArm]
    generated: Sequence[Generation]


class Unfinished:
    """The stored groups of one evaluation.

    Args:
        folder: Folder of unfinished evaluations; None: nothing is stored.
        made_with: What outputs and times depend on.
    """

    def __init__(self, folder: Path | None, made_with: Mapping[str, Any]) -> None:
        text = json.dumps(made_with, sort_keys=True, default=str)
        self._root = folder
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS] if folder else None
        for other in folder.glob("*") if folder else ():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    def read(self, temperature: float, number: int) -> DecodedGroup | None:
        """Return a group that was decoded before; None: it must be decoded."""
        path = self._path(temperature, number)
        return from_json(DecodedGroup, read_json(path)) if path is not None and path.exists() else None

    def store(self, temperature: float, number: int, group: DecodedGroup) -> None:
        """Store a group that all arms have decoded."""
        if (path := self._path(temperature, number)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, to_json(group))

    def remove(self) -> None:
        """Remove what was stored: the evaluation has finished."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _path(self, temperature: float, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{temperature:g}-{number:06d}.json"


def made_with(
    folders: Mapping[str, Path], target: Target, prompts: Sequence[Prompt], settings: EvalSettings
) -> dict[str, Any]:
    """Return everything that the outputs and times of an evaluation depend on."""
    parts = list(components_of(settings))
    heads, corpora, calibrations = (
        [name for one in parts if (name := getattr(one, key, None))] for key in ("head", "corpus", "calibration")
    )
    about = provenance()
    return {
        "target": [target.name, target.fingerprint, str(target.model.dtype), str(target.device)],
        "tokenizer": target.tokenizer_fingerprint,
        "drafters": {name: _content(folder) for name, folder in folders.items()},
        "heads": [_content(Path(head)) for head in heads],
        "corpora": [text_digest(Path(corpus).expanduser()) for corpus in corpora],
        "calibrations": [text_digest(Path(one).expanduser()) for one in calibrations],
        "prompts": [replace(prompt, tokens=list(prompt.tokens), chat=None) for prompt in prompts],
        "settings": settings.as_dict(),
        "versions": [about["commit"], about["python"], about["packages"], about["machine"]],
        "threads": torch.get_num_threads(),
    }


def _content(folder: Path) -> str:
    return files_digest(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
