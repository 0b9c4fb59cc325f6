"""Medusa, as its authors write it (`{head}.{block}.linear.weight`, in .pt or safetensors) and as vLLM does (`blocks`, `lm_heads`).

V = vocabulary, D = hidden, K = heads
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.export import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.fields import TENSORS_UNSEEN, size_problems, target_problems, unknown_problems
from drafttrain.importers.naming import Rename, renamed
from drafttrain.importers.target import TargetFiles

SIZES = {"num_heads": "medusa_num_heads", "num_hidden_layers": "medusa_num_layers"}
"""vLLM's name and the authors'."""

KNOWN = (
    *("model_type", "hidden_size", "vocab_size", *SIZES, *SIZES.values(), "medusa_fc_bias", "base_model_name_or_path"),
    *("original_lm_head", "truncated_vocab_size", "max_paths", "topk", "max_seq_len", "version", "drafttrain_draft"),
)
BLOCK, HEAD = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)"), re.compile(r"(\d+)\.(\d+)\.weight")
OUR_BLOCK, OUR_HEAD = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(\w+)"), re.compile(r"lm_heads\.(\d+)\.weight")


@dataclass
class MedusaLayout:
    """Medusa."""


@importers.register("medusa", MedusaLayout)
class MedusaImporter(Importer):
    """Heads of residual blocks. Blocks without biases get zeros, which say the same; a head that all share is copied to each.

    Source: Cai et al. 2024, Medusa, arXiv 2401.10774.
    """

    holds: ClassVar[str] = "medusa"
    known_by: ClassVar[str] = "model_type medusa or medusa_num_heads in config.json, or a file medusa_lm_head.*"

    def recognises(self, given: Given) -> bool:
        """Tell by the configuration or the name of the file."""
        named = "MedusaModel" in given.architectures or given.config.get("model_type") == "medusa"
        return named or "medusa_num_heads" in given.config or given.weights.startswith("medusa_lm_head.")

    def target_of(self, given: Given) -> str | None:
        """Return the model that it was trained on."""
        name = given.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        sizes, found, notes = _sizes(given.config, target)
        found += unknown_problems(given.config, known=KNOWN)
        found += _refused(given.config, sizes)
        if any(not isinstance(value, int) for value in sizes.values()):
            found.append(f"{TENSORS_UNSEEN}: their shapes follow from these fields")
            return Imported(DrafterFiles("medusa", {}, {}), found, notes)
        authors = any(BLOCK.fullmatch(name) for name in given.tensors)
        biased, wrong = _biased(given, authors=authors)
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            **sizes,
            "medusa_fc_bias": biased,
        }
        shapes = LAYOUTS["medusa"][0](config)
        shared = given.config.get("original_lm_head") is True
        if shared:
            shapes = {
                name: shape for name, shape in shapes.items() if not name.startswith("lm_heads.") or ".0." in name
            }
        ours, theirs = _names(sizes["num_hidden_layers"]) if authors else (str, str)
        tensors, named = renamed(given, shapes, ours=ours, theirs=theirs)
        if shared and not named:
            notes.append("original_lm_head: the head that all share is copied to each")
            tensors |= {
                f"lm_heads.{k}.weight": tensors["lm_heads.0.weight"].clone() for k in range(1, sizes["num_heads"])
            }
        if not biased and not named:
            notes.append("the blocks have no biases: zeros are written, which say the same")
            tensors |= {
                name.replace(".weight", ".bias"): torch.zeros(tensor.shape[0], dtype=tensor.dtype)
                for name, tensor in tensors.items()
                if name.startswith("blocks.")
            }
        config |= {"medusa_fc_bias": True, "drafttrain_draft": given.config.get("drafttrain_draft", "sampled")}
        return Imported(DrafterFiles("medusa", config, tensors), [*found, *wrong, *named], notes)


def _sizes(config: Mapping[str, Any], target: TargetFiles) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (hidden size, vocabulary, heads and blocks, problems, notes)."""
    sizes: dict[str, Any] = {}
    found, notes = [], []
    for key in ("hidden_size", "vocab_size"):
        sizes[key] = config.get(key)
        if sizes[key] is None:
            sizes[key] = target.size(key)
            notes.append(f"config.json: {key} is left out: taken as {sizes[key]}, the target's")
    for key, other in SIZES.items():
        both = [config[name] for name in (key, other) if config.get(name) is not None]
        if len(both) == 2 and both[0] != both[1]:
            found.append(f"config.json: {key} is {both[0]}, {other} {both[1]}: must be the same")
        sizes[key] = both[0] if both else None
    found += size_problems(sizes, sizes)
    return sizes, found + target_problems(sizes, target), notes


def _refused(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Return the fields of which our heads have one form."""
    found = []
    for key in ("medusa_fc_bias", "original_lm_head"):
        if config.get(key) not in (None, True, False):
            found.append(f"config.json: {key} must be true or false, got {config[key]!r}")
    if config.get("model_type") not in (None, "medusa", "llama", "mistral"):
        found.append(f"config.json: model_type is {config['model_type']!r}, must be 'medusa' or left out")
    if config.get("truncated_vocab_size") not in (None, sizes["vocab_size"]):
        found.append(
            f"config.json: truncated_vocab_size is {config['truncated_vocab_size']}, only null or vocab_size "
            f"({sizes['vocab_size']}) is read here"
        )
    return found


def _biased(given: Given, *, authors: bool) -> tuple[bool, list[str]]:
    """Return (whether the blocks have biases, problems): the file tells; vLLM's field must say the same."""
    said, held = given.config.get("medusa_fc_bias"), any(name.endswith(".bias") for name in given.tensors)
    if held and not said and not (said is None and authors):
        return True, [
            "config.json: medusa_fc_bias is not true, and the file holds biases: vLLM drops them without a word; "
            "write true if they were trained"
        ]
    return held or bool(said), []


def _names(num_layers: int) -> tuple[Rename, Rename]:
    """Return (our name of one of the authors', theirs of one of ours)."""

    def ours(name: str) -> str:
        if block := BLOCK.fullmatch(name):
            return f"blocks.{block[1]}.layers.{block[2]}.{block[3]}"
        head = HEAD.fullmatch(name)
        return f"lm_heads.{head[1]}.weight" if head and int(head[2]) == num_layers else name

    def theirs(name: str) -> str:
        if block := OUR_BLOCK.fullmatch(name):
            return f"{block[1]}.{block[2]}.linear.{block[3]}"
        head = OUR_HEAD.fullmatch(name)
        return f"{head[1]}.{num_layers}.weight" if head else name

    return ours, theirs
