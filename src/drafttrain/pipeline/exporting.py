"""The stage behind the training: the best weights as a folder, judged, with card and report, held against the gate."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError, GateError
from drafttrain.core.files import folder_beside, write_text
from drafttrain.pipeline.data import training_data
from drafttrain.pipeline.drafter_folder import calibrate, export_weights
from drafttrain.pipeline.engines import folder_as, formats_of, in_engines, write_engine_card
from drafttrain.pipeline.evaluating import evaluated_elsewhere
from drafttrain.pipeline.head import export_trained_head
from drafttrain.pipeline.training import start_of
from drafttrain.train.result import TrainResult, folder_of_step, kept_steps

if TYPE_CHECKING:
    from drafttrain.pipeline.run import Run


def export_and_judge(run: Run) -> None:
    """Export the best weights, evaluate the files in a process of their own, write card and report, hold the gate."""
    from drafttrain.eval.gate import shortfalls
    from drafttrain.eval.report import write_report
    from drafttrain.eval.result import current_result
    from drafttrain.eval.table import show
    from drafttrain.export.head import head_card
    from drafttrain.serving.card import model_card

    recipe, folder = run.recipe, run.folder
    of_head = recipe.head is not None
    exported, rejected = (folder.head, folder.rejected_head) if of_head else (folder.drafter, folder.rejected)
    done = training_result(run)
    before = current_result(folder.eval)
    if before is not None and (exported.exists() or rejected.exists()):
        say("export and evaluation: done before, skipped")
        result = before
        show(result)
    else:
        if of_head:
            export_trained_head(recipe, folder, run.target, trained=folder.train / done.drafter)
        else:
            _export_trained(run, done)
        if not run.has_target():
            say(f"exported: {exported} (no target in this recipe, so nothing to evaluate it against)")
            return
        # The evaluation loads a target of its own: two would have to fit the device.
        run.release()
        result = evaluated_elsewhere(run)
    resolved, command = run.resolved, command_line()
    best, last = done.best, done.last
    if best is not None:
        say(
            f"exported: step {done.best_step} ({done.best_by.replace('_', ' ')} {best:.3f} on held-out data); "
            f"last step {done.last_step} ({last:.3f})"
        )
    write_report(folder.report, result, title=recipe.name, metrics=folder.train / "metrics.csv", command=command)
    if exported.exists():
        # An export before this one was rejected; this one is judged now.
        shutil.rmtree(rejected, ignore_errors=True)
    short = shortfalls(result, recipe.export.require, drafter="drafter")
    comparisons = [] if of_head else in_engines(run, exported if exported.exists() else rejected)
    short += [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    kept, other = (rejected, exported) if short else (exported, rejected)
    formats = [] if of_head else formats_of(recipe.export)
    if other.exists():
        os.replace(other, kept)
        for format in formats:
            shutil.rmtree(folder_as(kept, format), ignore_errors=True)
            os.replace(folder_as(other, format), folder_as(kept, format))
    if of_head:
        card = head_card(recipe.name, result, recipe=resolved, command=command)
    else:
        card = model_card(recipe.name, result, drafter="drafter", recipe=resolved, command=command)
    write_text(kept / "README.md", card)
    for format in formats:
        of_format = [one for one in comparisons if one["format"] == format]
        write_engine_card(folder_as(kept, format), kept, of_format, format=format)
    if comparisons:
        write_engine_card(kept, kept, comparisons)
    say(f"{'head:   ' if of_head else 'drafter:'} {kept}")
    say(f"report:  {folder.report}")
    if short:
        raise GateError(
            f"gate not met, the {'head' if of_head else 'drafter'} is in {kept}:\n"
            + "\n".join(f"  {line}" for line in short)
        )


def export_best(run: Run) -> TrainResult:
    """Write the drafter folder from the best weights of the training; return what the training gave."""
    done = training_result(run)
    _export_trained(run, done)
    return done


def _export_trained(run: Run, done: TrainResult) -> None:
    from drafttrain.drafters import Drafter, drafters

    trained = run.folder.train / done.drafter
    component = cast(Any, drafters.entry(run.recipe.drafter.kind).component)
    if component.calibrate is not Drafter.calibrate:
        calibrate(run, component.load(trained, run.target), trained)
    export_weights(run, trained, run.folder.drafter, steps=done.best_step)


def training_result(run: Run) -> TrainResult:
    """Return what the training gave; of one that has not ended, or of the step that the recipe exports, the same.

    Raises:
        DrafttrainError: There are no such weights.
    """
    folder, step = run.folder, run.recipe.export.step
    done = (
        TrainResult(**json.loads(folder.train_done.read_text(encoding="utf-8"))) if folder.train_done.exists() else None
    )
    if done and step is None:
        return done
    kept = {one["step"]: one for one in kept_steps(folder.train)}
    if step is not None and step not in kept:
        there = ", ".join(map(str, sorted(kept))) or "none"
        raise DrafttrainError(f"{folder.path}: no weights are kept of step {step}; of these: {there} (train.keep_best)")
    if kept:
        chosen = next(iter(kept)) if step is None else step
        weights = str(folder_of_step(folder.train, chosen).relative_to(folder.train))
        if done:
            return replace(done, drafter=weights, best_step=chosen, best=kept[chosen][done.best_by])
        say(f"the training has not ended: step {chosen} of {run.recipe.train.max_steps} is exported")
        return TrainResult(weights, chosen, chosen)
    if run.recipe.head is not None:
        raise DrafttrainError(f"{folder.path}: the head has no validated step yet: drafttrain fit does all stages")
    from drafttrain.train.checkpoints import newest_checkpoint, weights_of_checkpoint

    newest = newest_checkpoint(folder.train / "checkpoints")
    if newest is None:
        raise DrafttrainError(f"{folder.path}: no checkpoint that can be read: drafttrain fit does all stages")
    reached, trained = weights_of_checkpoint(newest)
    drafter = start_of(run, training_data(run))
    missing = {name for name, p in drafter.named_parameters() if p.requires_grad} - trained.keys()
    if missing:
        raise CheckpointError(f"{newest}: lacks weights of this recipe's drafter: {', '.join(sorted(missing)[:5])}")
    drafter.load_state_dict(trained, strict=False)
    with folder_beside(folder.train / "last") as temporary:
        drafter.save(temporary)
    say(f"the training has not ended: {newest} is exported")
    return TrainResult("last", reached, reached)


def command_line() -> str:
    return " ".join(["drafttrain", *sys.argv[1:]])
