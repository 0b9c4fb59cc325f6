"""The Python API: `drafttrain.load_target`, `load_drafter`, `evaluate`, `cascade`, `train`.

These five keep their names and arguments; other modules may change between versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.cascade import frontier_of
from drafttrain.commands.fit import fit
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.drafters import Drafter
from drafttrain.eval.cascade.frontier import Frontier
from drafttrain.eval.cascade.settings import FrontierSettings
from drafttrain.eval.proposers.language_model import language_model_of
from drafttrain.eval.result import Result
from drafttrain.eval.settings import EvalSettings
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder


def load_target(model: str = "builtin:target", **settings: Any) -> Target:
    """Load a frozen target.

    Args:
        model: A local folder, a hub id, or `builtin:target`.
        settings: Further keys of the recipe's section `target`: `dtype`, `device`, `attention`, ...

    Raises:
        CheckpointError: The folder is no causal language model, or its files are damaged.
    """
    quiet_libraries()
    return Target.load(TargetSettings(model=model, **settings))


def load_drafter(drafter: str | Path, target: Target) -> Drafter:
    """Load a drafter for a target; `drafter.proposer(target)` decodes with it.

    Args:
        drafter: A folder that drafttrain exported or imported, a hub id, or `builtin:drafter`.

    Raises:
        CheckpointError: The folder is damaged, or the drafter was trained for another tokenizer.
    """
    return read_drafter(resolve_folder(str(drafter)), target)


def evaluate(
    drafters: str | Path | Mapping[str, str | Path], target: Target, *, prompts: str = "builtin:test", **settings: Any
) -> Result:
    """Decode prompts with exported drafters and with the target alone, and compare.

    Args:
        drafters: A drafter folder, or several by name. Each pair is compared, paired over prompts.
        prompts: A file of JSON lines, or `builtin:test`.
        settings: Further keys of the recipe's section `eval`: `num_prompts`, `max_new_tokens`, `temperatures`, ...

    Returns:
        The content of `eval.json`. `drafttrain.eval.table.show(result)` prints its tables.

    Raises:
        RecipeError: Settings that contradict each other.
        DataError: A file of prompts that cannot be read, or prompts that are too long for the target.
    """
    folders = drafters if isinstance(drafters, Mapping) else {"drafter": drafters}
    wanted = EvalSettings(prompts=prompts, **settings)
    if problems := wanted.check():
        raise RecipeError("arguments", problems)
    return evaluate_folders(
        {name: resolve_folder(str(one)) for name, one in folders.items()}, target, wanted, dropped=()
    )


def cascade(
    small: Drafter,
    target: Target,
    *,
    by: Any,
    values: Sequence[float] | None = None,
    draft: Any = None,
    cost: str = "bytes",
    prompts: str = "builtin:test",
    **settings: Any,
) -> Frontier:
    """Let a small model write a part of the target's texts, LOSSY, and measure quality against cost.

    Args:
        small: A drafter with a language model of its own that reads the target's tokens (`causal_lm`).
        by: Who writes what: the settings of a kind in `drafttrain.eval.cascade.kinds`.
        values: Of the kind's swept setting; None: those of the kind.
        draft: Settings of a length policy: the small model drafts for the target's spans, without loss; None: it does not.
        cost: `bytes`, `flops`, `seconds`, or a GPU such as `h100`.
        prompts: A file of JSON lines, or `builtin:test`.
        settings: Further keys of the recipe's section `eval`: `checker`, `num_prompts`, `max_new_tokens`, ... The first of
            `temperatures` counts.

    Returns:
        The content of `cascade.json`. `drafttrain.eval.cascade.shown.show(frontier)` prints its table.

    Raises:
        RecipeError: Settings that contradict each other.
        CheckpointError: The small model is none.
        DataError: Prompts that cannot be read or checked.
    """
    evaluated = EvalSettings(prompts=prompts, **settings)
    wanted = FrontierSettings(by, None if values is None else list(values), draft, cost)
    if problems := [*evaluated.check(), *wanted.check()]:
        raise RecipeError("arguments", problems)
    return frontier_of(target, language_model_of(small, "cascade"), evaluated, wanted, small=small.kind)


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    smoke: bool = False,
) -> Path:
    """Run all stages of a recipe: data, training, export, evaluation. Called again, it continues where it stopped.

    The training runs in this process; for several devices use `drafttrain fit`. A loss, drafter kind or source of your own is
    named in `plugins`, by the module that registers it.

    Args:
        recipe: A YAML file, or the name of a bundled recipe.
        overrides: Values of the recipe by key, such as `{"train.lr": 3e-4, "plugins": ["my_loss"]}`.
        folder: The run folder. Default: `runs/<name of the recipe>`.
        smoke: Shrink the recipe to 20 steps through every stage.

    Returns:
        The folder of the exported drafter or head; of a recipe with `online`, the version that is served.

    Raises:
        RecipeError: Every problem of the recipe at once.
        GateError: The drafter is below `export.require`; it was written to `drafter.rejected`.
    """
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in (overrides or {}).items()
    ]
    loaded = load_recipe(str(recipe), words, smoke=smoke)
    run = Path(folder) if folder is not None else Path("runs") / loaded.name
    fit(loaded, run)
    if loaded.online is not None:
        return run / "drafters" / "current"
    return RunFolder(run).head if loaded.head is not None else RunFolder(run).drafter
