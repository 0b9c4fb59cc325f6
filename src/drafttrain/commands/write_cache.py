"""`python -m drafttrain.commands.write_cache RUN`: the process that `pipeline.cache_process` starts.

It writes the cached target outputs of a run folder, and ends when its standard input is closed. Why it failed goes to standard output.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError
from drafttrain.pipeline.drafter_run import DrafterRun


def main(folder: Path) -> None:
    """Write what is missing."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        DrafterRun(recipe, folder, opening="join", placement=recipe.train.target_placement).write_cache()
    except DrafttrainError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
