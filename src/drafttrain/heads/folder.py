"""Reads the folder of a head, and checks that it is used with the models that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import load_into
from drafttrain.heads.token_head import CONFIG, WEIGHTS, MadeFor, TokenHead, heads
from drafttrain.target_model import Target
from drafttrain.target_model.folders import fingerprint_of


@dataclass(frozen=True)
class LoadedHead:
    """A head read from its folder, and the models that it was trained on."""

    head: TokenHead
    made_for: MadeFor | None


def load_head(folder: Path, *, kind: str) -> LoadedHead:
    """Read the folder that `TokenHead.save` wrote.

    Raises:
        CheckpointError: The folder is missing or damaged, or holds a head of another kind.
    """
    config = _config(folder)
    if config["kind"] != kind:
        raise CheckpointError(f"{folder}: contains a head of kind {config['kind']!r}, but {kind!r} is needed here")
    entry = heads.entry(kind)
    head: TokenHead = entry.component(entry.settings(**config["settings"]), config["hidden_size"])
    load_into(head, folder / WEIGHTS)
    return LoadedHead(head.eval().requires_grad_(False), config["made_for"])


def check_made_for(folder: Path, *, target: Target, drafter: Path) -> None:
    """Refuse a head that was trained on other models: its predictions mean nothing for these.

    A head whose folder does not name its models passes.

    Raises:
        CheckpointError: With every model that differs.
    """
    made: MadeFor | None = _config(folder)["made_for"]
    if made is None:
        return
    if others := differing_models(made, target=target, drafter=drafter):
        raise CheckpointError(
            f"{folder}: this head was made for {' and '.join(others)}. Train a head for these models, or pass the models "
            "that it was made for."
        )


def differing_models(made: MadeFor, *, target: Target, drafter: Path) -> list[str]:
    """Return which models are other ones than those that something was made for."""
    others = []
    if made.target_fingerprint != target.fingerprint:
        others.append(f"the target {made.target} ({made.target_fingerprint}), not {target.name} ({target.fingerprint})")
    if made.drafter_fingerprint != (found := fingerprint_of(drafter)):
        others.append(f"the drafter {made.drafter} ({made.drafter_fingerprint}), not {drafter} ({found})")
    return others


def _config(folder: Path) -> dict[str, Any]:
    """Return kind, settings, hidden_size and made_for from the folder of a head."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: not the folder of a head: it has no {CONFIG}")
    try:
        config = read_json(path)
        return {
            "kind": config["kind"],
            "settings": config["settings"],
            "hidden_size": int(config["hidden_size"]),
            "made_for": MadeFor(**config["made_for"]) if "made_for" in config else None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the configuration of a head: {error!r}") from error
