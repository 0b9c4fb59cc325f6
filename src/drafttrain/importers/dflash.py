"""DFlash as z-lab, SpecForge, Automodel and transformers write it: Qwen3's layers, fc and hidden_norm, no embedding, often no head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drafttrain.core.printable import shown
from drafttrain.drafters.dflash.dflash import DFlash
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.export.transformers import MODEL_TYPE, RENAMED
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.eagle3 import with_map
from drafttrain.importers.fields import (
    FURTHER,
    HEAD_NORMS,
    layer_fields,
    layer_problems,
    unknown_fields,
    without_other_forms,
)
from drafttrain.importers.naming import renamed, unwrapped, without
from drafttrain.importers.target import TargetFiles

NESTED = "dflash_config"
ARCHITECTURES = ("DFlashDraftModel", "Qwen3DFlashDraftModel", "MuseGlimmerAssistantModel")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
OWN = (
    *(NESTED, "block_size", "num_target_layers", "draft_vocab_size", "target_hidden_size", "sample_from_anchor"),
    *("num_hidden_layers", "tie_word_embeddings", "is_causal", "mask_token_id", "target_layer_ids"),
)
OF_NESTED = (
    "mask_token_id",
    "target_layer_ids",
    "causal",
    "sample_from_anchor",
    "use_aux_hidden_state",
    "projector_type",
)
NESTED_ONLY: dict[str, Any] = {"use_aux_hidden_state": True, "projector_type": "dflash"}
"""Fields of the nested section, and the one value that is supported; null or a missing field means it."""
MASK_FILE = "mask_embedding.pt"


@dataclass
class DFlashLayout:
    """DFlash of z-lab, and of transformers."""


@importers.register("dflash", DFlashLayout)
class DFlashImporter(Importer):
    """`target_layer_ids` are blocks whose output is read, one less than drafttrain's taps.

    A head that equals the target's is dropped; another one is kept and trained further.
    """

    holds: ClassVar[str] = "dflash"
    known_by: ClassVar[str] = f"architectures {' or '.join(ARCHITECTURES)}, or {NESTED} in config.json"

    def recognises(self, given: Given) -> bool:
        """Return whether config.json names DFlash."""
        return NESTED in given.config or bool(given.architectures & set(ARCHITECTURES))

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout has no field for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        nested = given.config.get(NESTED) or {}
        if not isinstance(nested, Mapping):
            return Imported(
                DrafterFiles("dflash", {}, {}), [f"config.json: {NESTED} must be a mapping, got {shown(nested)}"]
            )
        found, notes = nested_problems(nested)
        if (given.folder / MASK_FILE).exists():
            found.append(
                f"{MASK_FILE}: mask slots with a vector of their own are not supported: they embed mask_token_id"
            )
        wrong, more = layer_problems(given.config, own=OWN)
        given = unwrapped(given)
        if given.config.get("model_type") == MODEL_TYPE:
            names = {theirs: ours for ours, theirs in RENAMED.items()}
            given = replace(
                given,
                tensors={names.get(name, name): tensor for name, tensor in given.tensors.items()},
                files={names.get(name, name): file for name, file in given.files.items()},
            )
        made = dflash_files(given, target)
        return Imported(made.files, [*found, *wrong, *made.problems], [*notes, *more, *made.notes])


def nested_problems(nested: Mapping[str, Any], *, further: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Return (problems, notes) of the fields of the nested section.

    Args:
        further: Fields that a kind has besides DFlash's.
    """
    found, notes = unknown_fields(nested, known=[*OF_NESTED, *further], prefix=f"{NESTED}.")
    found += [
        f"config.json: {NESTED}.{key} is {shown(nested[key])}, must be {only!r}: it would be another kind of drafter"
        for key, only in NESTED_ONLY.items()
        if nested.get(key) not in (None, only)
    ]
    return found, notes


def dflash_files(given: Given, target: TargetFiles) -> Imported:
    """Return the files of a drafter from a configuration of one level, with z-lab's fields."""
    fields, found, notes = layer_fields(given.config, target)
    if given.config.get("rope_theta") is None and not (given.config.get("rope_parameters") or {}).get("rope_theta"):
        found.append("config.json: rope_theta is missing: vLLM assumes 1000000, transformers 10000")
    if not fields:
        return Imported(DrafterFiles("dflash", {}, {}), found, notes)
    given, others = without_other_forms(given, found, allowed=(FURTHER, HEAD_NORMS))
    given, wrong, dropped = without_copies(given, {EMBEDDING: target.embedding}, target)
    given, more = _without_targets_head(given, target)
    own = _own_fields(given, target)
    config = {"architectures": ["DFlashDraftModel"], **fields, **own}
    given, angles = without_angles(given, fields)
    found, notes = [*found, *others, *wrong, *angles], [*notes, *dropped, *more]
    if HEAD in given.tensors:
        given, mapped, more = with_map(given, config)
        found, notes = [*found, *mapped], [*notes, *more]
    shapes_of, _ = LAYOUTS["dflash"]
    try:
        shapes = shapes_of(config)
    except (KeyError, TypeError):
        return Imported(DrafterFiles("dflash", config, {}), found or _missing(config), notes)
    tensors, named = renamed(given, shapes, ours=lambda name: name, theirs=lambda name: name)
    return Imported(DrafterFiles("dflash", config, tensors), [*found, *named], notes)


def _own_fields(given: Given, target: TargetFiles) -> dict[str, Any]:
    """Return the fields of the kind, some of which layouts have on the first level and some in the section."""
    config = given.config
    nested = config.get(NESTED) or {}
    layers = config.get("num_hidden_layers")
    causal = nested.get("causal") if config.get("is_causal") is None else config["is_causal"]
    head_RD = given.tensors.get(HEAD)
    return {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "layer_types": config.get("layer_types") or ["full_attention"] * (layers if isinstance(layers, int) else 0),
        "block_size": config.get("block_size"),
        "sample_from_anchor": config.get("sample_from_anchor") or nested.get("sample_from_anchor") or False,
        "num_target_layers": target.size("num_hidden_layers"),
        "draft_vocab_size": None if head_RD is None else len(head_RD),
        NESTED: {
            "mask_token_id": nested.get("mask_token_id", config.get("mask_token_id")),
            "target_layer_ids": nested.get("target_layer_ids", config.get("target_layer_ids")),
            "causal": causal or False,
        },
        "drafttrain": DFlash.own_defaults(),
    }


def _missing(config: Mapping[str, Any]) -> list[str]:
    return [
        f"config.json: {key} is {shown(value)}"
        for key, value in (*config.items(), *config[NESTED].items())
        if key in ("num_hidden_layers", "target_layer_ids") and not value
    ]


def _without_targets_head(given: Given, target: TargetFiles) -> tuple[Given, list[str]]:
    """Return (the folder without a head that equals the target's, notes)."""
    own_VD, theirs_VD = given.tensors.get(HEAD), target.head
    if own_VD is None or theirs_VD is None or own_VD.shape != theirs_VD.shape:
        return given, []
    if not bool((own_VD == theirs_VD.to(own_VD.dtype)).all()):
        return given, [f"{HEAD}: differs from the target's, so the drafter keeps a head of its own"]
    return without(given, [HEAD, "d2t", "t2d"]), [f"{HEAD}: dropped, it equals the target's"]
