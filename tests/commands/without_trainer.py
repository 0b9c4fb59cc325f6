"""Run a command where lightning and deepspeed cannot be imported, then import all that recipes, evaluation and export consist of."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

TRAINER = {"lightning", "pytorch_lightning", "lightning_fabric", "deepspeed"}


class Without:
    """A finder that does not see what is not installed here."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in TRAINER else self.finder.find_spec(name, path, target)


def main() -> None:
    sys.meta_path = [Without(finder) for finder in sys.meta_path]
    try:
        importlib.import_module("lightning")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("lightning can be imported: nothing is proven")
    importlib.import_module("drafttrain.cli").app(sys.argv[1:], standalone_mode=False)
    for room in ("eval", "export", "importers", "config"):
        package = importlib.import_module(f"drafttrain.{room}")
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    importlib.import_module("drafttrain.config.schema").recipe_schema()  # scans every registry
    assert not TRAINER & {name.split(".")[0] for name in sys.modules}


if __name__ == "__main__":
    main()
