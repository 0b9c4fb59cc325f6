"""A byte-level BPE tokenizer in GGUF: tokens, merges, special ids, and the name that llama.cpp has for its way to split text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.gguf_splitting import SPLITTINGS, Splitting, steps_of
from drafttrain.target_model.tokenizer import load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""

BEGIN, PADDING = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"
END, SECOND_END = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"
TOKENS = "tokenizer.ggml.tokens"

NORMAL_FORM = "NFC"
"""Unicode form to which Qwen's tokenizer converts text and llama.cpp does not; most text is in this form already."""


class GgufTokenizer:
    """The tokenizer of a model folder, and its fields in GGUF.

    Args:
        vocab_size: Rows of the embedding; ids without a token are padding.

    Raises:
        CheckpointError: The folder has no readable tokenizer.json.
    """

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        path = folder / "tokenizer.json"
        try:
            self._json: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
        self._folder = folder
        self._vocab_size = vocab_size

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return what llama.cpp cannot hold or would silently do differently."""
        model = self._json["model"]
        if model["type"] != "BPE" or (self._json.get("decoder") or {}).get("type") != "ByteLevel":
            return [f"tokenizer.json: is {model['type']}: only byte-level BPE can be written as GGUF"]
        found = [
            f"tokenizer.json: model.{key} is {model[key]!r}: llama.cpp does not support it"
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(key)
        ]
        if not model["merges"]:
            found.append("tokenizer.json: has no merges: llama.cpp refuses such a vocabulary")
        if self._normalizer not in (None, NORMAL_FORM):
            found.append(f"tokenizer.json: normalizer {self._normalizer}: llama.cpp silently skips it")
        found += [*self._splitting_problems(), *self._added_problems()]
        if self._ids and max(self._ids) >= self._vocab_size:
            found.append(
                f"tokenizer.json: has token id {max(self._ids)}, but the model has only {self._vocab_size} rows"
            )
        if not _ids_of(config.get("eos_token_id")):
            found.append("config.json: eos_token_id is missing: llama.cpp would end texts at token id 11")
        return found or [*self._surrounding_problems(config)]

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what llama.cpp does differently with text, though not with token ids."""
        notes = []
        if self._normalizer:
            notes.append(
                f"llama.cpp does not normalize text: text that is not in {self._normalizer} already gets other tokens"
            )
        further = _ids_of(config.get("eos_token_id"))[2:]
        if further:
            notes.append(
                f"GGUF names two tokens that end a text; of {further}, llama.cpp stops only at those whose text it knows"
            )
        return tuple(notes)

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a tokenizer without problems."""
        before, after = self._surrounding
        ends = _ids_of(config.get("eos_token_id"))
        fields = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self._splitting.name,
            TOKENS: [self._ids.get(i, (f"[PAD{i}]", UNUSED))[0] for i in range(self._vocab_size)],
            "tokenizer.ggml.token_type": [self._ids.get(i, ("", UNUSED))[1] for i in range(self._vocab_size)],
            "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in self._json["model"]["merges"]],
            END: ends[0],
            "tokenizer.ggml.add_bos_token": bool(before),
            "tokenizer.ggml.add_eos_token": bool(after),
        }
        for key, values in ((BEGIN, _ids_of(config.get("bos_token_id"))), (SECOND_END, ends[1:])):
            if values:
                fields[key] = values[0]
        if (padding := _ids_of(config.get("pad_token_id"))) and padding[0] >= 0:
            fields[PADDING] = padding[0]
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return fields | ({"tokenizer.chat_template": template} if template else {})

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._folder)

    @cached_property
    def _ids(self) -> dict[int, tuple[str, int]]:
        """Token and type by id."""
        known = {token_id: (token, NORMAL) for token, token_id in self._json["model"]["vocab"].items()}
        added = {
            one["id"]: (one["content"], CONTROL if one["special"] else USER_DEFINED)
            for one in self._json.get("added_tokens") or ()
        }
        return known | added

    @property
    def _normalizer(self) -> str | None:
        normalizer = self._json.get("normalizer")
        return normalizer["type"] if normalizer else None

    @property
    def _splitting(self) -> Splitting:
        return SPLITTINGS[tuple(steps_of(self._json.get("pre_tokenizer")))]

    def _splitting_problems(self) -> list[str]:
        steps = tuple(steps_of(self._json.get("pre_tokenizer")))
        if steps not in SPLITTINGS:
            known = ", ".join(sorted(one.name for one in SPLITTINGS.values()))
            return [
                f"tokenizer.json: pre_tokenizer {list(steps)} splits text in a way that has no known name ({known}): llama.cpp would "
                "silently split it differently"
            ]
        splitting, ignores_merges = SPLITTINGS[steps], bool(self._json["model"].get("ignore_merges"))
        if splitting.ignore_merges != ignores_merges:
            return [
                f"tokenizer.json: model.ignore_merges is {ignores_merges}: llama.cpp uses {splitting.ignore_merges} with {splitting.name}"
            ]
        return []

    def _added_problems(self) -> list[str]:
        return [
            f"tokenizer.json: token {one['content']!r} has {flag}: llama.cpp does not support it"
            for one in self._json.get("added_tokens") or ()
            for flag in ("lstrip", "rstrip", "single_word")
            if one.get(flag)
        ]

    @cached_property
    def _surrounding(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    def _surrounding_problems(self, config: Mapping[str, Any]) -> Iterator[str]:
        for ids, key in zip(self._surrounding, ("bos_token_id", "eos_token_id"), strict=True):
            if ids and ids != _ids_of(config.get(key))[:1]:
                yield f"tokenizer.json: adds {ids} to texts, but {key} in config.json is {config.get(key)}: llama.cpp adds the latter"


def _pair(merge: Any) -> list[str]:
    """Return both sides of a merge, which older files store as one string."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _ids_of(value: Any) -> list[int]:
    """Return the ids in a field that holds one, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
