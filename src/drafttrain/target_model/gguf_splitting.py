"""The ways to split text before byte-level BPE that GGUF has a name for, as steps of a pre-tokenizer in tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Splitting:
    """A way to split text before BPE, under llama.cpp's name for it."""

    name: str
    ignore_merges: bool = False
    """A piece of text that is a token becomes that token without merges."""


BYTES, WORDS = ("ByteLevel", False), ("ByteLevel", True)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS: dict[tuple[Step, ...], Splitting] = {
    (WORDS,): Splitting("gpt-2"),
    (("Digits", True), WORDS): Splitting("smollm"),
    (("Split", CONTRACTIONS + r"\p{N}" + REST), BYTES): Splitting("qwen2"),
    (("Split", CONTRACTIONS + r"\p{N}{1,3}" + REST), BYTES): Splitting("llama-bpe", ignore_merges=True),
}
SAME = {
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "deepseek-r1-qwen": "qwen2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}
"""Further names that llama.cpp has for these ways."""


def steps_of(node: Mapping[str, Any] | None) -> Iterator[Step]:
    """Yield the steps of a pre-tokenizer in tokenizer.json."""
    if node is None:
        return
    kind = node["type"]
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from steps_of(part)
    elif kind == "ByteLevel" and not node.get("add_prefix_space"):
        yield kind, node.get("use_regex", True)
    elif kind == "Digits":
        yield kind, node.get("individual_digits", False)
    elif kind == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        yield kind, node["pattern"].get("Regex")
    else:
        yield tuple(node.items())


def splitting_named(name: str | None) -> tuple[dict[str, Any], Splitting] | None:
    """Return the pre-tokenizer in tokenizer.json for llama.cpp's name of a way to split; None: the name is not known here."""
    for steps, splitting in SPLITTINGS.items():
        if splitting.name == SAME.get(str(name), name):
            return {"type": "Sequence", "pretokenizers": [_node(step) for step in steps]}, splitting
    return None


def _node(step: Step) -> dict[str, Any]:
    """Return a step as in tokenizer.json."""
    kind, value = step
    fields: dict[str, dict[str, Any]] = {
        "ByteLevel": {"add_prefix_space": False, "trim_offsets": True, "use_regex": value},
        "Digits": {"individual_digits": value},
        "Split": {"pattern": {"Regex": value}, "behavior": "Isolated", "invert": False},
    }
    return {"type": kind, **fields[kind]}
