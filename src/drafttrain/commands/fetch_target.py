"""drafttrain target fetch: the file of a known target, and what to write into a recipe."""

from __future__ import annotations

from pathlib import Path

from drafttrain.target_model.known_targets import KNOWN, fetch, known_target


def fetch_target(name: str, *, to: Path | None = None) -> list[str]:
    """Fetch a known target; return the lines to print: file, licence, and the line for a recipe.

    Args:
        to: Folder for the file; None: in the user's cache, where recipes find it by its short name.
    """
    target = known_target(name.removeprefix(KNOWN))
    path = fetch(target, to)
    named = f"{KNOWN}{target.name}" if to is None else str(path)
    return [
        f"file: {path}",
        f"licence: {target.licence} (from {target.packages})",
        f"recipe: target: {{model: {named}}}",
        f"full precision: {target.hub_id} on the hub",
    ]
