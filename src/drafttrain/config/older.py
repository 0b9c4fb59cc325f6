"""The recipe of a run folder that an older version wrote, read as what it meant then."""

from __future__ import annotations

from collections.abc import Callable

from drafttrain.config.nodes import Node


def read_as_now(root: Node) -> list[str]:
    """Bring the recipe that stands in a run folder up to today's keys, in place; return what was read as what.

    Every version writes all keys of its time, so a replaced key tells its age. A recipe of a user is not read so: its keys mean what they
    mean today.
    """
    train, target = _section(root, "train"), _section(root, "target")
    if "accumulation" not in train:
        return []
    notes = [READ[key](train) for key in list(train) if key in READ]
    if "tf32" not in train:
        # No training used it then.
        notes.append(_put(train, "tf32", Node(False, "", text="false"), before="no train.tf32", path="train"))
    dtype = target.get("dtype")
    if dtype is not None and dtype.value == "auto":
        notes.append(
            _put(
                target, "dtype", Node("stored", dtype.where, text="stored"), before="target.dtype: auto", path="target"
            )
        )
    return notes


def _accumulation(train: dict[str, Node]) -> str:
    """So many micro-batches of a step are at most so many records each, on each device that the recipe names."""
    node = train.pop("accumulation")
    count, batch, devices = node.value, _number(train, "batch_size"), _number(train, "devices") or 1
    most = -(-batch // (count * devices)) if batch and type(count) is int and count > 1 else None
    made = Node(most, node.where, text="null" if most is None else str(most))
    return _put(train, "records_per_device", made, before=f"train.accumulation: {node.text}", path="train")


READ: dict[str, Callable[[dict[str, Node]], str]] = {"accumulation": _accumulation}
"""What is done with each key of `train` that was replaced."""


def _put(section: dict[str, Node], key: str, node: Node, *, before: str, path: str) -> str:
    section[key] = node
    return f"{before} as {path}.{key}: {node.text}"


def _section(root: Node, name: str) -> dict[str, Node]:
    node = root.value.get(name) if isinstance(root.value, dict) else None
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _number(section: dict[str, Node], key: str) -> int | None:
    value = section[key].value if key in section else None
    return value if type(value) is int and value > 0 else None
