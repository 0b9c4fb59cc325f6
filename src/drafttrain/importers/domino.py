"""Domino in the published layout: z-lab's block, with `prefix_gru` and `embed_proj` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from drafttrain.drafters.domino.domino import PREFIX, PROJECTOR, SIZES, Domino, field_problems
from drafttrain.importers import Given, importers
from drafttrain.importers.published_block import BLOCK, PublishedBlock, filled_in


def is_domino(given: Given) -> bool:
    """Return whether the block has Domino's projector."""
    block = given.config.get(BLOCK)
    return isinstance(block, Mapping) and block.get("projector_type") == PROJECTOR


@dataclass
class DominoLayout:
    """Domino."""


@importers.register("domino", DominoLayout)
class DominoImporter(PublishedBlock):
    """SpecForge's layout. A missing `shift_label` is false and a missing `pure_draft_prefix_len` 0, as SpecForge reads them."""

    holds: ClassVar[str] = "domino"
    known_by: ClassVar[str] = f"{BLOCK}.projector_type {PROJECTOR} in config.json"
    own = ("emb_dim",)

    def recognises(self, given: Given) -> bool:
        """Return whether the projector is Domino's."""
        return is_domino(given)

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the correction."""
        return field_problems(config)

    def fields(self, given: Given) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Return the fields of the correction."""
        theirs = given.config[BLOCK]
        defaults = {"shift_label": False, PREFIX: 0}
        of_block, notes = filled_in(theirs, defaults, prefix=f"{BLOCK}.", why="as SpecForge reads it")
        own = {
            "architectures": [Domino.architecture],
            "sample_from_anchor": of_block["shift_label"] is True,
            "drafttrain": Domino.own_defaults(),
        }
        return own, {"projector_type": PROJECTOR, **{key: theirs.get(key) for key in SIZES}, **of_block}, notes
