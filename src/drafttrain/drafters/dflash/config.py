"""config.json of a block drafter: the fields of a new one, and the checks of one that is read.

The fields are those of z-lab's DFlash checkpoints, and `drafttrain`, which engines ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.printable import shown
from drafttrain.drafters.dflash.settings import BlockSettings
from drafttrain.drafters.draft_vocabulary import size_for
from drafttrain.drafters.eagle.folder import read_config
from drafttrain.drafters.eagle.layer_config import layer_config
from drafttrain.drafters.mask_token import mask_token_of
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks


def new_config(settings: BlockSettings, target: Target) -> dict[str, Any]:
    """Return the fields of a new drafter. Width and unset sizes are the target's.

    Raises:
        CheckpointError: Taps, sizes or the mask token do not fit the target.
    """
    num_target_layers = len(blocks(target.model))
    fields = layer_config(
        target,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        intermediate_size=settings.intermediate_size,
        head_dim=settings.head_dim,
    )
    return {
        **fields,
        "model_type": "qwen3",
        "num_hidden_layers": settings.num_layers,
        "layer_types": ["full_attention"] * settings.num_layers,
        "block_size": settings.block_size,
        "sample_from_anchor": settings.sample_from_anchor,
        "num_target_layers": num_target_layers,
        "draft_vocab_size": settings.draft_vocab_size and size_for(target, settings.draft_vocab_size),
        "dflash_config": {
            "mask_token_id": mask_token_of(target, settings.mask_token_id),
            "target_layer_ids": layer_ids(taps_of(num_target_layers, settings.num_layers, settings.taps)),
            "causal": settings.causal,
        },
    }


def layer_ids(taps: Sequence[int]) -> list[int]:
    """Return taps, which count states entering a block, in z-lab's numbering: the block whose output is read.

    -1 is the embedding. vLLM adds 1 to these ids, and counts then as taps do.
    """
    return [tap - 1 for tap in taps]


def taps_in(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the taps of a configuration."""
    return tuple(number + 1 for number in config["dflash_config"]["target_layer_ids"])


def taps_of(num_target_layers: int, num_layers: int, given: Sequence[int] | None = None) -> list[int]:
    """Return the given taps, or z-lab's choice: as many as the drafter has layers, evenly from block 1 to three before the end.

    Of a target with few layers, equal taps are taken once.

    Raises:
        CheckpointError: A tap is not the input of a block of the target.
    """
    if given is not None:
        if given[-1] >= num_target_layers:
            raise CheckpointError(
                f"drafter.taps must be blocks of 0..{num_target_layers - 1} for this target ({num_target_layers} layers), "
                f"got {list(given)}"
            )
        return list(given)
    if num_layers == 1:
        outputs = [num_target_layers // 2]
    else:
        outputs = [round(1 + i * (num_target_layers - 4) / (num_layers - 1)) for i in range(num_layers)]
    return sorted({max(0, min(output + 1, num_target_layers - 1)) for output in outputs})


def read_block_config(
    folder: Path,
    target: Target,
    *,
    own: Mapping[str, Any],
    problems_of: Callable[[Mapping[str, Any]], list[str]],
) -> dict[str, Any]:
    """Return config.json of a drafter folder that fits this target.

    Args:
        own: Defaults of the settings that the folder stores.
        problems_of: Checks the fields that only this kind has.

    Raises:
        CheckpointError: It has other sizes, or it is not a drafter folder of this project.
    """
    config = read_config(folder, target, own=own)
    if found := [*block_problems(config, num_target_layers=len(blocks(target.model))), *problems_of(config)]:
        lines = [f"{folder}: this drafter cannot be loaded", *(f"config.json: {line}" for line in found)]
        raise CheckpointError("\n  ".join(lines))
    return config


def block_problems(config: Mapping[str, Any], *, num_target_layers: int | None = None) -> list[str]:
    """Return one line for every wrong field that a block drafter has beyond those of its layers.

    Args:
        num_target_layers: Of the target; None: not known.
    """
    found = [
        f"{key} must be a whole number of {least}..4096, got {shown(config.get(key))}"
        for key, least in (("num_hidden_layers", 1), ("block_size", 1))
        if type(config.get(key)) is not int or not least <= config[key] <= 4096
    ]
    if type(config.get("sample_from_anchor", False)) is not bool:
        found.append(f"sample_from_anchor must be true or false, got {shown(config['sample_from_anchor'])}")
    if config.get("block_size") == 1 and not config.get("sample_from_anchor"):
        found.append("block_size is 1 and sample_from_anchor false: no slot predicts anything")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        found.append(
            f"layer_types must all be full_attention, got {shown(kinds)}: engines differ in what sliding layers do"
        )
    return [*found, *_own_problems(config, num_target_layers)]


def _own_problems(config: Mapping[str, Any], num_target_layers: int | None) -> list[str]:
    given = config.get("dflash_config")
    if not isinstance(given, Mapping):
        return [f"dflash_config must be a mapping, got {shown(given)}"]
    found = []
    ids, last = given.get("target_layer_ids"), None if num_target_layers is None else num_target_layers - 2
    if not isinstance(ids, list) or not ids or any(type(one) is not int for one in ids) or sorted(set(ids)) != ids:
        found.append(f"dflash_config.target_layer_ids must be whole numbers in rising order, got {shown(ids)}")
    elif ids[0] < -1 or (last is not None and ids[-1] > last):
        found.append(f"dflash_config.target_layer_ids must be blocks of -1..{last}, got {shown(ids)}")
    mask, size = given.get("mask_token_id"), config.get("vocab_size")
    if type(mask) is not int or mask < 0 or (type(size) is int and mask >= size):
        found.append(
            f"dflash_config.mask_token_id must be an id of the target's vocabulary ({size}), got {shown(mask)}"
        )
    if type(given.get("causal", False)) is not bool:
        found.append(f"dflash_config.causal must be true or false, got {shown(given['causal'])}")
    return found


def section_sizes(section: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return one line for every size in `dflash_config` that is no whole number of 1 or more."""
    return [
        f"dflash_config.{key} must be a whole number of 1..65536, got {shown(section.get(key))}"
        for key in keys
        if type(section.get(key)) is not int or not 1 <= section[key] <= 65536
    ]
