"""Medusa with the authors' names (`{head}.{block}.linear.weight`, in .pt or safetensors) or vLLM's (`blocks`, `lm_heads`).

V = the target's vocabulary, R = the heads', D = hidden
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from drafttrain.core.printable import shown
from drafttrain.drafters.draft_vocabulary import token_map_problems
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.fields import TENSORS_UNSEEN, size_problems, target_problems, unknown_fields
from drafttrain.importers.naming import Rename, renamed
from drafttrain.importers.target import TargetFiles

SIZES = {"num_heads": "medusa_num_heads", "num_hidden_layers": "medusa_num_layers"}
"""vLLM's names, and the authors'."""

SHARED_HEAD = "lm_heads.0.weight"
"""The output matrix of all heads, if config.json has original_lm_head: true."""

TOKEN_MAP = "token_map"
"""The target's id of each token of the heads."""

NUM_SIZES = 4
HEAD_PREFIXES = ("blocks.", "lm_heads.", "lm_head.")
MANY = 8
"""More unknown tensors than this belong to a whole model, not to wrong heads."""

KNOWN = (
    *("model_type", "hidden_size", "vocab_size", *SIZES, *SIZES.values(), "medusa_fc_bias", "base_model_name_or_path"),
    *(
        "original_lm_head",
        "truncated_vocab_size",
        "max_paths",
        "topk",
        "max_seq_len",
        "version",
        "drafttrain_draft",
        "logit_scale",
    ),
)
BLOCK, HEAD = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)"), re.compile(r"(\d+)\.(\d+)\.weight")
INSIDE = re.compile(r"(?:model\.)?medusa_heads?\.(\d+\..+)")
"""Name of a head's tensor in the file of a whole model."""

OUR_BLOCK, OUR_HEAD = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(\w+)"), re.compile(r"lm_heads\.(\d+)\.weight")


@dataclass
class MedusaLayout:
    """Medusa."""


@importers.register("medusa", MedusaLayout)
class MedusaImporter(Importer):
    """Heads of residual blocks. The file decides their number: published configurations of the authors say 2 where files hold 5.

    Blocks without biases get zeros, which have the same effect. If the file holds blocks only (the authors' version "2"), all heads
    share the target's output matrix.

    Source: Cai et al. 2024, Medusa, arXiv 2401.10774.
    """

    holds: ClassVar[str] = "medusa"
    known_by: ClassVar[str] = "model_type medusa or medusa_num_heads in config.json, or a file medusa_lm_head.*"

    def recognises(self, given: Given) -> bool:
        """Return whether the configuration or the name of the weight file is Medusa's."""
        named = "MedusaModel" in given.architectures or given.config.get("model_type") == "medusa"
        return named or "medusa_num_heads" in given.config or given.weights.startswith("medusa_lm_head.")

    def target_of(self, given: Given) -> str | None:
        """Return the model that the heads were trained on."""
        name = given.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        given = _unwrapped(given)
        authors = any(BLOCK.fullmatch(name) for name in given.tensors)
        sizes, found, notes = _sizes(given, target, authors=authors)
        wrong, unread = unknown_fields(given.config, known=KNOWN)
        found, notes = [*found, *wrong, *_refused(given.config, sizes)], [*notes, *unread]
        others = [name for name in given.tensors if not name.startswith(HEAD_PREFIXES) and not name[0].isdigit()]
        if authors and len(others) > MANY:
            found.append(
                f"{given.weights}: holds {len(others)} tensors of a whole model besides the heads: give a file of the heads only"
            )
            return Imported(DrafterFiles("medusa", {}, {}), found, notes)
        if len(sizes) < NUM_SIZES or not all(isinstance(value, int) for value in sizes.values()):
            found.append(f"{TENSORS_UNSEEN}: their shapes follow from these fields")
            return Imported(DrafterFiles("medusa", {}, {}), found, notes)
        biased, wrong = _biased(given, authors=authors)
        ours, theirs = _names(sizes["num_hidden_layers"]) if authors else (str, str)
        blocks_only = not any(ours(name).startswith("lm_heads.") for name in given.tensors)
        config = {"architectures": ["MedusaModel"], "model_type": "medusa", **sizes, "medusa_fc_bias": biased}
        if given.config.get("truncated_vocab_size") not in (None, sizes["vocab_size"]):
            config["truncated_vocab_size"] = given.config["truncated_vocab_size"]
        if blocks_only or given.config.get("original_lm_head") is True:
            config["original_lm_head"] = True
        shapes = LAYOUTS["medusa"][0](config)
        if blocks_only:
            del shapes[SHARED_HEAD]
            wrong += _without_heads_problems(given, target)
        given, cut = _cut_to_token_map(given, config)
        tensors, named = renamed(given, shapes, ours=ours, theirs=theirs)
        found += [*wrong, *named]
        if found:
            return Imported(DrafterFiles("medusa", config, tensors), found, notes)
        notes += cut
        if blocks_only:
            assert target.head is not None, "_without_heads_problems checks it"
            tensors[SHARED_HEAD] = target.head.to(next(iter(tensors.values())).dtype)
            notes.append('version "2": all heads share the target\'s output matrix')
        if not biased:
            notes.append("the blocks have no biases: zeros are added, which have the same effect")
            tensors |= {
                name.replace(".weight", ".bias"): torch.zeros(tensor.shape[0], dtype=tensor.dtype)
                for name, tensor in tensors.items()
                if name.startswith("blocks.")
            }
        config |= {"medusa_fc_bias": True, "drafttrain_draft": given.config.get("drafttrain_draft", "sampled")}
        return Imported(DrafterFiles("medusa", config, tensors), [], notes)


def _unwrapped(given: Given) -> Given:
    """Return the folder with the heads' own names; in the file of a whole model they begin with `medusa_head.`."""
    inside = {name: match[1] for name in given.tensors if (match := INSIDE.fullmatch(name))}
    if not inside:
        return given
    tensors = {inside.get(name, name): tensor for name, tensor in given.tensors.items()}
    return replace(given, tensors=tensors, files={inside.get(name, name): file for name, file in given.files.items()})


def _without_heads_problems(given: Given, target: TargetFiles) -> list[str]:
    """Return why a file of blocks only cannot be completed with the target's head."""
    if given.config.get("version") not in (2, "2"):
        return [
            f"{given.weights}: blocks without output matrices, and config.json: version is {given.config.get('version')!r}: "
            'only version "2" uses the target\'s head'
        ]
    if target.head is None:
        return [f"{given.weights}: blocks without output matrices, and {target.name} has none under a known name"]
    return []


def _cut_to_token_map(given: Given, config: Mapping[str, Any]) -> tuple[Given, list[str]]:
    """Return the folder with the rows of its own vocabulary only (vLLM's loader also accepts matrices of all rows), and notes."""
    ids_R, rows = given.tensors.get(TOKEN_MAP), config.get("truncated_vocab_size")
    if rows is None or ids_R is None or token_map_problems(ids_R, vocab_size=config["vocab_size"]):
        return given, []
    whole = [
        name
        for name, tensor in given.tensors.items()
        if name.startswith("lm_head") and len(tensor) == config["vocab_size"]
    ]
    tensors = {name: tensor[ids_R] if name in whole else tensor for name, tensor in given.tensors.items()}
    return replace(given, tensors=tensors), [f"{name}: cut to the {rows} rows of token_map" for name in whole]


def _sizes(given: Given, target: TargetFiles, *, authors: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (hidden size, vocabulary size, numbers of heads and blocks; problems; notes). The tensors decide the numbers."""
    sizes: dict[str, Any] = {}
    config, found, notes = given.config, [], []
    for key in ("hidden_size", "vocab_size"):
        sizes[key] = config.get(key)
        if sizes[key] is None:
            sizes[key] = target.size(key)
            notes.append(f"config.json: {key} is missing: set to {sizes[key]}, the target's")
    places = [match for name in given.tensors if (match := (BLOCK if authors else OUR_BLOCK).fullmatch(name))]
    held = {
        "num_heads": len({match[1] for match in places}),
        "num_hidden_layers": len({match[2] for match in places}),
    }
    if not places:
        return sizes, [f"{given.weights}: no blocks of Medusa heads ({{head}}.{{block}}.linear.weight or blocks.*)"], []
    for key, other in SIZES.items():
        stated = {name: config[name] for name in (key, other) if config.get(name) is not None}
        found += size_problems(stated, stated)
        sizes[key] = held[key]
        fewer = key == "num_heads"
        for name, value in stated.items():
            if fewer and value != held[key] and _is_fewer(value, held[key]):
                notes.append(
                    f"config.json: {name} is {value}, {given.weights} holds {held[key]} heads: all are imported"
                )
            elif value != held[key]:
                what = "heads" if fewer else "blocks a head"
                found.append(f"config.json: {name} is {value!r}, {given.weights} holds {held[key]} {what}")
    found += size_problems(sizes, sizes)
    return sizes, found + target_problems(sizes, target), notes


def _is_fewer(value: Any, held: int) -> bool:
    return type(value) is int and 0 < value < held


def _refused(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Return the fields with values that drafttrain's heads do not support."""
    # vLLM's loader reads any field with both words in its name as the number of heads.
    found = [
        f"config.json: {key} is {config[key]!r}: vLLM reads it as the number of heads: remove it"
        for key in config
        if "num" in key and "heads" in key and key not in ("num_heads", "medusa_num_heads") and "num_heads" in config
    ]
    for key in ("medusa_fc_bias", "original_lm_head"):
        if config.get(key) not in (None, True, False):
            found.append(f"config.json: {key} must be true or false, got {config[key]!r}")
    rows, size = config.get("truncated_vocab_size"), sizes["vocab_size"]
    if rows is not None and not (type(rows) is int and type(size) is int and 1 <= rows <= size):
        found.append(f"config.json: truncated_vocab_size must be 1..vocab_size ({size}) or null, got {shown(rows)}")
    return found


def _biased(given: Given, *, authors: bool) -> tuple[bool, list[str]]:
    """Return (whether the blocks have biases, problems): the tensors decide, and vLLM's field must agree."""
    stated, held = given.config.get("medusa_fc_bias"), any(name.endswith(".bias") for name in given.tensors)
    if held and not stated and not (stated is None and authors):
        return True, [
            "config.json: medusa_fc_bias is not true, but the file holds biases: vLLM 0.32.0 silently drops them; "
            "set it to true if they were trained"
        ]
    return held or bool(stated), []


def _names(num_layers: int) -> tuple[Rename, Rename]:
    """Return functions from the authors' names to drafttrain's, and back."""

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
