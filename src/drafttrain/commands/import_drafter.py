"""drafttrain import: a drafter folder from the drafter of another project."""

from __future__ import annotations

from pathlib import Path

from drafttrain.core.console import say
from drafttrain.importers.convert import import_folder
from drafttrain.pipeline.run import quiet_libraries


def import_drafter(folder: Path, *, target: str | None, out: Path | None) -> None:
    """Convert a drafter of another project into a drafter folder, and print what was changed.

    Args:
        target: The drafter's target; None: the one that its files name.
        out: The new folder; None: `FOLDER.drafter`.
    """
    quiet_libraries()
    folder = folder.resolve()
    out = out or folder.with_name(f"{folder.name}.drafter")
    made = import_folder(folder, out, target=target)
    for note in made.notes:
        say(f"{folder.name}: {note}")
    say(f"imported: {out} (drafter.kind {made.files.kind})")
