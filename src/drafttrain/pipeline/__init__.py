"""gen -> train -> export -> eval: the one room that sees a whole recipe, and hands each other room its own section."""

from drafttrain.pipeline.commands import (
    evaluate_drafters,
    evaluate_recipe,
    export,
    export_drafter_as,
    export_run_as,
    fit,
    gen,
    import_drafter,
    learn_online,
    rollback,
)

__all__ = [
    "evaluate_drafters",
    "evaluate_recipe",
    "export",
    "export_drafter_as",
    "export_run_as",
    "fit",
    "gen",
    "import_drafter",
    "learn_online",
    "rollback",
]
