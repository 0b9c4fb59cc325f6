"""What layouts of z-lab's block with further tensors beside it share: Domino, XPress. Embedding and head are the target's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from drafttrain.drafters.dflash.config import block_problems, layer_ids, taps_of
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.importers import Claim, Given, Imported, Importer
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.fields import layer_fields, layer_problems, size_problems
from drafttrain.importers.naming import renamed, unwrapped
from drafttrain.importers.target import TargetFiles

BLOCK = "dflash_config"
OWN = (
    *("num_hidden_layers", "block_size", "sample_from_anchor", "num_target_layers", "draft_vocab_size", BLOCK),
    *("tie_word_embeddings", "drafttrain"),
)
COPIES = ("embed_tokens.weight", "lm_head.weight")


class PublishedBlock(Importer):
    """A block under z-lab's names, and the tensors of a kind under ours. Copies of embedding and head are dropped, others refused."""

    claim = Claim.VARIANT
    own: ClassVar[Sequence[str]]
    """Fields of the first level that only this kind has."""

    @abstractmethod
    def fields(self, given: Given) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Return (fields of the first level, fields of the section of the block, notes on what was filled in) that a kind has."""

    @abstractmethod
    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field that only this kind has."""

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout does not name it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        given = unwrapped(given)
        found, notes = layer_problems(given.config, own=[*OWN, *self.own])
        fields, wrong, more = layer_fields(given.config, target)
        found, notes = [*found, *wrong], [*notes, *more]
        if sizes := size_problems(given.config, ["num_hidden_layers", "block_size"]):
            return Imported(DrafterFiles(self.holds, {}, {}), [*found, *sizes], notes)
        if not fields:
            return Imported(DrafterFiles(self.holds, {}, {}), found, notes)
        config, filled = self._config(given, fields, target)
        wrong = [*block_problems(config, num_target_layers=config["num_target_layers"]), *self.field_problems(config)]
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

    def _config(self, given: Given, fields: Mapping[str, Any], target: TargetFiles) -> tuple[dict[str, Any], list[str]]:
        """Return (config.json of the drafter folder, notes on what was filled in)."""
        theirs, num_layers = given.config.get(BLOCK), given.config["num_hidden_layers"]
        theirs = theirs if isinstance(theirs, Mapping) else {}
        num_target_layers, notes = target.size("num_hidden_layers"), []
        ids = theirs.get("target_layer_ids")
        if ids is None:
            ids = layer_ids(taps_of(num_target_layers, num_layers))
            notes.append(f"config.json: {BLOCK}.target_layer_ids is missing: set to {ids}, as z-lab's code does")
        of_kind, of_block, more = self.fields(given)
        config = {
            **fields,
            "model_type": "qwen3",
            "num_hidden_layers": num_layers,
            "layer_types": ["full_attention"] * num_layers,
            "block_size": given.config["block_size"],
            "num_target_layers": num_target_layers,
            "draft_vocab_size": None,
            BLOCK: {
                "mask_token_id": theirs.get("mask_token_id"),
                "target_layer_ids": ids,
                "causal": theirs.get("causal", False),
                **of_block,
            },
            **of_kind,
        }
        return config, [*notes, *more]


def filled_in(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *, prefix: str, why: str
) -> tuple[dict[str, Any], list[str]]:
    """Return (these fields with the default of each that is missing, a note for each that is)."""
    notes = [
        f"config.json: {prefix}{key} is missing: set to {value!r}, {why}"
        for key, value in defaults.items()
        if key not in given
    ]
    return {key: given.get(key, value) for key, value in defaults.items()}, notes
