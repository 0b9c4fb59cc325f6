"""Reads the recipe of a run folder that an older version wrote: its keys are translated to current ones."""

from __future__ import annotations

from collections.abc import Callable

from drafttrain.config.nodes import Node


def translate_to_current(root: Node) -> list[str]:
    """Translate the recipe of a run folder to current keys, in place; return a note on each change.

    Every version writes all of its keys, so a replaced key shows an older version. A user's own recipe is not translated:
    its keys have their current meaning.
    """
    train, target = _section(root, "train"), _section(root, "target")
    notes = _logged_distributions(_section(root, "data"))
    if "accumulation" not in train:
        return notes
    notes += [TRANSLATED[key](train) for key in list(train) if key in TRANSLATED]
    if "tf32" not in train:
        # Older versions never used TF32.
        notes.append(_put(train, "tf32", Node(False, "", text="false"), before="no train.tf32", path="train"))
    dtype = target.get("dtype")
    if dtype is not None and dtype.value == "auto":
        notes.append(
            _put(
                target, "dtype", Node("stored", dtype.where, text="stored"), before="target.dtype: auto", path="target"
            )
        )
    return notes


def _logged_distributions(data: dict[str, Node]) -> list[str]:
    """Translate the key that tells a source of serving logs whether to train on their log-probabilities."""
    sources = data["sources"].value if "sources" in data else None
    places = {
        f"data.sources.{number}": node for number, node in enumerate(sources if isinstance(sources, list) else [])
    }
    generate = data["generate"].value if "generate" in data else None
    if isinstance(generate, dict) and "prompts" in generate:
        places["data.generate.prompts"] = generate["prompts"]
    notes = []
    for path, source in places.items():
        if isinstance(source.value, dict) and (node := source.value.pop(LOGGED_DISTRIBUTION, None)) is not None:
            notes.append(_put(source.value, "logprobs", node, before=f"{path}.{LOGGED_DISTRIBUTION}", path=path))
    return notes


LOGGED_DISTRIBUTION = "law"
"""The older name of `logprobs`."""


def _accumulation(train: dict[str, Node]) -> str:
    """Translate a number of micro-batches into the most records that one of them had, on each device of the recipe."""
    node = train.pop("accumulation")
    count, batch, devices = node.value, _number(train, "batch_size"), _number(train, "devices") or 1
    most = -(-batch // (count * devices)) if batch and type(count) is int and count > 1 else None
    made = Node(most, node.where, text="null" if most is None else str(most))
    return _put(train, "records_per_device", made, before=f"train.accumulation: {node.text}", path="train")


TRANSLATED: dict[str, Callable[[dict[str, Node]], str]] = {"accumulation": _accumulation}
"""How each replaced key of `train` is translated."""


def _put(section: dict[str, Node], key: str, node: Node, *, before: str, path: str) -> str:
    section[key] = node
    return f"{before} as {path}.{key}: {node.text}"


def _section(root: Node, name: str) -> dict[str, Node]:
    node = root.value.get(name) if isinstance(root.value, dict) else None
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _number(section: dict[str, Node], key: str) -> int | None:
    value = section[key].value if key in section else None
    return value if type(value) is int and value > 0 else None
