"""XPress in the published layout: z-lab's block, with `xpress_head` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from drafttrain.drafters.xpress.xpress import BLOCK_SIZE, FIELDS, XPress, field_problems
from drafttrain.importers import Given, importers
from drafttrain.importers.published_block import PublishedBlock, filled_in

ARCHITECTURES = (XPress.architecture, "DFlashQwen3XPressModel")
DEFAULTS = {"xpress_rank": 256, "xpress_mlp_hidden": 512, "xpress_num_passes": 6}
"""What vLLM takes for missing fields."""


@dataclass
class XPressLayout:
    """XPress."""


@importers.register("xpress", XPressLayout)
class XPressImporter(PublishedBlock):
    """The authors' and vLLM's layout. Missing sizes and passes are vLLM's; a missing `xpress_topc` is 0, which is exact."""

    holds: ClassVar[str] = "xpress"
    known_by: ClassVar[str] = f"architectures {' or '.join(ARCHITECTURES)} in config.json"
    own = (BLOCK_SIZE, *FIELDS.values())

    def recognises(self, given: Given) -> bool:
        """Return whether config.json names XPress."""
        return bool(given.architectures & set(ARCHITECTURES))

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the head."""
        return field_problems(config)

    def fields(self, given: Given) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Return the fields of the head."""
        theirs = given.config
        known, notes = filled_in(theirs, DEFAULTS, prefix="", why="as vLLM reads it")
        exact, more = filled_in(
            theirs, {"xpress_topc": 0}, prefix="", why="which corrects all tokens (vLLM assumes 512)"
        )
        size, others = filled_in(theirs, {BLOCK_SIZE: theirs.get("block_size")}, prefix="", why="which is block_size")
        own = {
            "architectures": [XPress.architecture],
            "sample_from_anchor": bool(theirs.get("sample_from_anchor")),
            **size,
            **known,
            **exact,
            "drafttrain": XPress.own_defaults(),
        }
        return own, {}, [*notes, *more, *others]
