"""Domino in the published layout: z-lab's block, with `prefix_gru` and `embed_proj` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from drafttrain.drafters.dflash.config import block_problems, layer_ids, taps_of
from drafttrain.drafters.domino.domino import PREFIX, PROJECTOR, SIZES, Domino, field_problems
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.importers import Claim, Given, Imported, Importer, importers
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.fields import layer_fields, layer_problems, size_problems
from drafttrain.importers.naming import renamed, unwrapped
from drafttrain.importers.target import TargetFiles

BLOCK = "dflash_config"
OWN = (
    *("num_hidden_layers", "block_size", "sample_from_anchor", "num_target_layers", "draft_vocab_size", BLOCK),
    *("tie_word_embeddings", "emb_dim", "drafttrain"),
)
COPIES = ("embed_tokens.weight", "lm_head.weight")


def is_domino(given: Given) -> bool:
    """Return whether the block has Domino's projector."""
    block = given.config.get(BLOCK)
    return isinstance(block, Mapping) and block.get("projector_type") == PROJECTOR


@dataclass
class DominoLayout:
    """Domino."""


@importers.register("domino", DominoLayout)
class DominoImporter(Importer):
    """SpecForge's layout. A missing `shift_label` is false and a missing `pure_draft_prefix_len` 0, as SpecForge reads them.

    Embedding and head are the target's: copies of them are dropped, others refused.
    """

    holds: ClassVar[str] = "domino"
    claim = Claim.VARIANT
    known_by: ClassVar[str] = f"{BLOCK}.projector_type {PROJECTOR} in config.json"

    def recognises(self, given: Given) -> bool:
        """Return whether the projector is Domino's."""
        return is_domino(given)

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout does not name it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        given = unwrapped(given)
        found, notes = layer_problems(given.config, own=OWN)
        fields, wrong, more = layer_fields(given.config, target)
        found, notes = [*found, *wrong], [*notes, *more]
        if sizes := size_problems(given.config, ["num_hidden_layers", "block_size"]):
            return Imported(DrafterFiles(self.holds, {}, {}), [*found, *sizes], notes)
        if not fields:
            return Imported(DrafterFiles(self.holds, {}, {}), found, notes)
        config, filled = _config(given, fields, target)
        wrong = [*block_problems(config, num_target_layers=config["num_target_layers"]), *field_problems(config)]
        if wrong or given.config["num_hidden_layers"] > len(given.tensors):
            return Imported(
                DrafterFiles(self.holds, {}, {}), [*found, *(f"config.json: {line}" for line in wrong)], notes
            )
        given, copies, dropped = without_copies(
            given, dict(zip(COPIES, (target.embedding, target.head), strict=True)), target
        )
        given, angles = without_angles(given, fields)
        tensors, named = renamed(given, LAYOUTS[self.holds][0](config), ours=str, theirs=str)
        files = DrafterFiles(self.holds, config, tensors)
        return Imported(files, [*found, *copies, *angles, *named], [*notes, *filled, *dropped])


def _config(given: Given, fields: Mapping[str, Any], target: TargetFiles) -> tuple[dict[str, Any], list[str]]:
    """Return (config.json of the drafter folder, notes on what was filled in)."""
    theirs, num_layers, notes = given.config[BLOCK], given.config["num_hidden_layers"], []
    num_target_layers = target.size("num_hidden_layers")
    ids = theirs.get("target_layer_ids")
    if ids is None:
        ids = layer_ids(taps_of(num_target_layers, num_layers))
        notes.append(f"config.json: {BLOCK}.target_layer_ids is missing: set to {ids}, as z-lab's code does")
    of_block: dict[str, Any] = {"shift_label": False, PREFIX: 0}
    for key, value in of_block.items():
        if key in theirs:
            of_block[key] = theirs[key]
        else:
            notes.append(f"config.json: {BLOCK}.{key} is missing: set to {value!r}, as SpecForge reads it")
    config = {
        "architectures": [Domino.architecture],
        **fields,
        "model_type": "qwen3",
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "block_size": given.config["block_size"],
        "sample_from_anchor": of_block["shift_label"] is True,
        "num_target_layers": num_target_layers,
        "draft_vocab_size": None,
        BLOCK: {
            "mask_token_id": theirs.get("mask_token_id"),
            "target_layer_ids": ids,
            "causal": theirs.get("causal", False),
            "projector_type": PROJECTOR,
            **{key: theirs.get(key) for key in SIZES},
            **of_block,
        },
        "drafttrain": Domino.own_defaults(),
    }
    return config, notes
