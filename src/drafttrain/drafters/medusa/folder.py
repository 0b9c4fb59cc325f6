"""The folder of Medusa heads: the checks of its config.json, and its calibrated tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import shapes_in
from drafttrain.drafters.medusa.static_tree import Path as TreePath

TREE = "medusa_tree.json"
"""The calibrated tree and its table of accuracies, next to config.json. Serving engines ignore this file."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        CheckpointError: Keys are missing, or do not fit the weights.
    """
    config = read_json(folder / "config.json")
    needed = ("hidden_size", "vocab_size", "num_heads", "num_hidden_layers", "medusa_fc_bias")
    missing = [key for key in needed if key not in config]
    if missing:
        raise CheckpointError(f"{folder / 'config.json'}: no {', '.join(missing)}: not a Medusa folder")
    held = shapes_in(folder)
    for key, pattern in (("num_heads", r"blocks\.(\d+)\."), ("num_hidden_layers", r"blocks\.\d+\.layers\.(\d+)\.")):
        count = len({match[1] for name in held if (match := re.match(pattern, name))})
        if config[key] != count:
            raise CheckpointError(f"{folder / 'config.json'}: {key} is {config[key]!r:.60}, the weights have {count}")
    rows, size = config.get("truncated_vocab_size"), config["vocab_size"]
    if rows is not None and not (type(rows) is int and type(size) is int and 1 <= rows <= size):
        raise CheckpointError(
            f"{folder / 'config.json'}: truncated_vocab_size must be 1..vocab_size ({size!r:.60}) or null, got {rows!r:.60}"
        )
    if not config["medusa_fc_bias"]:
        raise CheckpointError(
            f"{folder / 'config.json'}: medusa_fc_bias is false: heads without biases are not supported"
        )
    return config


def read_tree(folder: Path) -> list[TreePath] | None:
    """Return the nodes of the calibrated tree, best first; None: the folder has none."""
    path = folder / TREE
    if not path.exists():
        return None
    try:
        return [tuple(map(int, one)) for one in read_json(path)["paths"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tree: {error}") from error
