"""Export of DSpark as DeepSpec writes it: fields on one level, with the embedding and head of the target.

Written after the source of DeepSpec and of vLLM 0.32.0, which reads the layout. vLLM's class runs on GPUs only, so it was not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.drafters.dspark.dspark import FIELDS, DSpark
from drafttrain.export import FOLDER, Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems
from drafttrain.export.target_weights import embedding_of, head_of

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FLAT = ("mask_token_id", "target_layer_ids")
"""Fields that our folder has in `dflash_config`."""
ARCHITECTURE = DSpark.architecture


@dataclass
class DeepSpecFormat:
    """DSpark as DeepSpec writes it."""


@exporters.register("deepspec", DeepSpecFormat)
class DeepSpecExporter(Exporter):
    """The folder's own tensors, with the target's embedding and head, which DeepSpec reads from the file.

    `target_layer_ids` are blocks whose output is read; -1 is the embedding. The root's slot predicts.
    """

    reads: ClassVar[Mapping[str, str]] = {"dspark": "dspark"}
    readers = "DeepSpec; vLLM on GPUs, where it was not run by this project"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the layout cannot hold, and weights of the target that cannot be found."""
        found = []
        if not source.config.get("sample_from_anchor"):
            found.append(
                "config.json: sample_from_anchor is false: readers of this layout take slot s for a guess of token s + 1"
            )
        if source.config["dflash_config"].get("causal"):
            found.append("config.json: dflash_config.causal is true: this layout has no field for it")
        folder = target_config.get(FOLDER)
        if folder is None or embedding_of(Path(folder)) is None:
            found.append(
                f"{EMBEDDING}: must be written, but the target in {folder} has no embedding under a known name"
            )
        return found

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the tensors with the target's, and the fields on one level."""
        given, folder = source.config, Path(target_config[FOLDER])
        config = {
            key: value
            for key, value in given.items()
            if key not in ("dflash_config", "sample_from_anchor") and not key.startswith("drafttrain")
        }
        config |= {key: given["dflash_config"][key] for key in FLAT}
        config |= {
            "architectures": [ARCHITECTURE],
            "num_anchors": given["drafttrain"]["anchors"],
            "tie_word_embeddings": False,
        }
        embedding_VD = embedding_of(folder)
        assert embedding_VD is not None, "refusals() checks it"
        # A target without a head of its own uses its embedding.
        head_VD = head_of(folder)
        theirs = {EMBEDDING: embedding_VD, HEAD: embedding_VD if head_VD is None else head_VD}
        dtype = source.tensors["fc.weight"].dtype
        tensors = {**{name: tensor.to(dtype).clone() for name, tensor in theirs.items()}, **source.tensors}
        notes = (*source.notes, *vanilla_notes(given))
        if "d2t" in tensors:
            notes = (*notes, "DeepSpec itself has no draft vocabulary: vLLM reads d2t")
        return replace(source, config=config, tensors=tensors, notes=notes)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what readers would refuse or drop."""
        needed = (*FLAT, *FIELDS.values(), "num_anchors", "block_size")
        if missing := [key for key in needed if files.config.get(key) is None]:
            return [f"config.json: {key} is missing" for key in missing]
        vocab, width = files.config.get("vocab_size"), files.config.get("hidden_size")
        found = []
        for name, rows in ((EMBEDDING, vocab), (HEAD, files.config.get("draft_vocab_size") or vocab)):
            tensor = files.tensors.get(name)
            if tensor is None:
                found.append(f"{name}: missing: DeepSpec reads it from the file")
            elif list(tensor.shape) != [rows, width]:
                found.append(f"{name}: shape {list(tensor.shape)}, must be {[rows, width]}")
        return found + layout_problems(as_dspark(files), target_config)

    def holds(self, folder: Path) -> bool:
        """Return whether config.json has DeepSpec's fields on one level."""
        return super().holds(folder) and ARCHITECTURE in _architectures(read_config(folder)) and _is_flat(folder)


def vanilla_notes(config: Mapping[str, Any]) -> list[str]:
    """Return that vLLM lacks a Markov head of this type, if it does."""
    head = config["markov_head_type"]
    return [] if head == "vanilla" else [f"markov_head_type is {head}: vLLM builds the vanilla head only"]


def as_dspark(files: DrafterFiles) -> DrafterFiles:
    """Return the files under our names of fields, without the tensors of the target."""
    config = {key: value for key, value in files.config.items() if key not in (*FLAT, "num_anchors")}
    nested = {key: files.config.get(key) for key in FLAT}
    theirs = {EMBEDDING} | (set() if files.config.get("draft_vocab_size") else {HEAD})
    return replace(
        files,
        config={**config, "sample_from_anchor": True, "dflash_config": {**nested, "causal": False}},
        tensors={name: tensor for name, tensor in files.tensors.items() if name not in theirs},
    )


def _architectures(config: Mapping[str, Any]) -> list[Any]:
    named = config.get("architectures")
    return named if isinstance(named, list) else []


def _is_flat(folder: Path) -> bool:
    return all(key in read_config(folder) for key in FLAT)
