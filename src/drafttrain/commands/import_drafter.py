"""drafttrain import: a drafter folder from one that somebody else trained."""

from __future__ import annotations

from pathlib import Path

from drafttrain.core.console import say
from drafttrain.importers.convert import import_folder
from drafttrain.pipeline.run import quiet_libraries


def import_drafter(folder: Path, *, target: str | None, out: Path | None) -> None:
    """Write the drafter folder of one that somebody else trained, and say what was changed on the way.

    Args:
        target: What it was made for; left out, what it says itself.
        out: Left out: beside it.
    """
    quiet_libraries()
    folder = folder.resolve()
    out = out or folder.with_name(f"{folder.name}.drafter")
    made = import_folder(folder, out, target=target)
    for note in made.notes:
        say(f"{folder.name}: {note}")
    say(f"imported: {out} (drafter.kind {made.files.kind})")
