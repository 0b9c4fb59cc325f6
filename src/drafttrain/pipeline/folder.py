"""The run folder: the recipe that made it, and which stages are done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import ABOUT
from drafttrain.config.dump import differences, dump_recipe
from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError, RecipeError
from drafttrain.core.files import lock, write_json, write_text
from drafttrain.core.foreign import read_json
from drafttrain.core.provenance import provenance
from drafttrain.data_gen.states.builtin import BuiltinStates
from drafttrain.eval.settings import EvalSettings
from drafttrain.export.settings import ExportSettings
from drafttrain.pipeline import inputs
from drafttrain.training.settings import TrainSettings

PROMPT_SETTINGS = ("prompts", "validation_prompts", "prompt_tokens")
"""Settings of the evaluation that decide which of its prompts are contaminated."""


WAIT_SECONDS = 60.0
"""Processes whose parent was killed end within a quarter of this time."""


class RunFolder:
    """The files and folders of a run: `runs/<name>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.provenance = path / "provenance.json"
        self.inputs = path / "inputs.json"
        self.data = path / "data"
        self.validation = self.data / "validation"
        self.contamination = self.data / "contaminated.json"
        self.pretrain = path / "pretrain"
        self.train = path
        self.train_done = path / "train.json"
        self.search = path / "search.jsonl"
        """The scores of a drafter that is searched instead of trained."""
        self.choice = path / "choice.json"
        """What the drafter starts from, where training texts decide."""
        self.start = path / "start"
        self.unfinished = path / "eval.unfinished"
        self.labelled = self.data / "labelled"
        self.drafter = path / "drafter"
        self.head = path / "head"
        self.eval = path / "eval.json"
        self.report = path / "report.html"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs for the block; a killed process releases the lock.

        Raises:
            DrafttrainError: Another run holds the lock and does not end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            limit = time.monotonic() + WAIT_SECONDS
            while not lock(file.fileno(), wait=False):
                if time.monotonic() > limit:
                    file.seek(0)
                    raise DrafttrainError(
                        f"{self.path}: another run is using this folder ({file.read()}). Wait until it ends, or stop it"
                    )
                time.sleep(0.2)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def rejected(self, what: str) -> Path:
        """Return the folder of a drafter or head that does not meet the gate."""
        return self.path / f"{what}.rejected"

    def exported(self, what: str) -> Path:
        """Return the exported drafter or head, or the rejected one.

        Raises:
            CheckpointError: None was exported yet.
        """
        for place in (self.path / what, self.rejected(what)):
            if place.exists():
                return place
        raise CheckpointError(f"{self.path}: no exported {what} here yet. Run drafttrain fit first")

    def has_weights(self) -> bool:
        """Return whether a training left weights here, finished or not."""
        checkpoints = (self.train / "checkpoints").glob("step-*.ckpt")
        return self.train_done.exists() or self.search.exists() or any(checkpoints)

    def _began(self) -> bool:
        """Return whether anything was trained: in pretraining, in training or online."""
        pretrained = (self.pretrain / "train.json").exists() or any((self.pretrain / "checkpoints").glob("step-*.ckpt"))
        return self.has_weights() or pretrained or (self.path / "online").exists()

    def remove_results(self) -> None:
        """Remove an evaluation of other weights or settings; it is made again."""
        for path in (self.eval, self.report):
            path.unlink(missing_ok=True)

    def stored_recipe(self) -> Recipe | None:
        """Return the recipe of the run in this folder; None if there is none.

        Raises:
            RecipeError: The recipe cannot be read.
        """
        # Loggers are not compared, so one that is not installed here must not keep a run from being read.
        return load_recipe(str(self.path), ["train.loggers=[csv]"]) if self.recipe.exists() else None

    def open(self, recipe: Recipe, *, evaluates_only: bool = False) -> None:
        """Open the folder for a recipe, or continue in it; figures of another evaluation or export are removed.

        Args:
            evaluates_only: Inputs that only a training reads are not checked.

        Raises:
            RecipeError: The folder holds a run of another recipe, or of the same recipe with other file contents. The message
                shows the differences.
        """
        held = self.stored_recipe()
        if held is not None:
            self._check_same_training(held, recipe)
            if not evaluates_only:
                say(f"{self.path}: continuing")
            self._remove_stale_results(held, recipe)
        self._check_inputs(recipe, evaluates_only=evaluates_only)
        write_text(self.recipe, dump_recipe(recipe))
        self._note_provenance()

    def changes_of_training(self, recipe: Recipe) -> list[str]:
        """Return what keeps a recipe from continuing the training begun here; empty where none began, or there is no folder."""
        held = self.stored_recipe()
        return self._changes(held, recipe) if held is not None and self._began() else []

    def _changes(self, held: Recipe, recipe: Recipe) -> list[str]:
        """Return how the settings differ that the weights depend on."""
        return differences(*(_training_settings(one, done=self.train_done.exists()) for one in (held, recipe)))

    def _check_same_training(self, held: Recipe, recipe: Recipe) -> None:
        """Refuse a change of what the weights depend on; before the training begins, make again what depends on it."""
        changes = self._changes(held, recipe)
        if not changes:
            return
        if self._began():
            raise RecipeError(f"{self.path}: holds a run of another recipe: {self._advice(recipe)}", changes)
        say(f"{self.path}: nothing is trained here yet, so the recipe may change: {'; '.join(changes)}")
        self.contamination.unlink(missing_ok=True)
        self.choice.unlink(missing_ok=True)
        shutil.rmtree(self.start, ignore_errors=True)
        if _labelling(held) != _labelling(recipe):
            shutil.rmtree(self.labelled, ignore_errors=True)

    def _advice(self, recipe: Recipe) -> str:
        """Return how to run another recipe, and how it can use the texts of this one."""
        texts = self.data / "generated"
        advice = "give this one another name (name=...) or remove the folder"
        if recipe.data.generate is None or not (texts / "manifest.json").exists():
            return advice
        return f"{advice}; to use its texts again, read them with {{kind: generated, path: {texts}}} and data.generate: null"

    def _remove_stale_results(self, held: Recipe, recipe: Recipe) -> None:
        """Remove results of settings that differ from the recipe's; their stages run again."""
        if held.eval != recipe.eval or replace(held.export, require={}) != replace(recipe.export, require={}):
            say(f"{self.path}: eval or export has changed: its results are made again")
            self.remove_results()
        if any(getattr(held.eval, name) != getattr(recipe.eval, name) for name in PROMPT_SETTINGS):
            self.contamination.unlink(missing_ok=True)

    def _check_inputs(self, recipe: Recipe, *, evaluates_only: bool) -> None:
        """Refuse inputs whose content changed since the training read them; remove results of evaluation inputs that changed.

        Raises:
            RecipeError: Naming the inputs that changed.
        """
        held = read_json(self.inputs) if self.inputs.exists() else {}
        now = inputs.inputs_of(recipe, only=inputs.is_evaluated_on if evaluates_only else lambda key: True)
        changed, done = inputs.changed(held, now), self.train_done.exists()
        only_judged = {inputs.PROMPTS, *([inputs.VALIDATION] if done else [])}
        trained_on = {
            key: words
            for key, words in changed.items()
            if key not in only_judged and not key.startswith((inputs.CHECKER, inputs.BESIDE))
        }
        if self._began():
            self._refuse(trained_on, "since the training here read it")
        elif any((self.data / "generated").glob("shard-*")):
            self._refuse(
                {
                    key: words
                    for key, words in trained_on.items()
                    if key in inputs.OF_TARGET or key.startswith(inputs.GENERATED_FROM)
                },
                "since texts were generated from it",
            )
        if changed:
            words = ", ".join(dict.fromkeys(changed.values()))
            say(f"{self.path}: {words}: changed since this run read it: its results are made again")
            self.remove_results()
            self.contamination.unlink(missing_ok=True)
        if trained_on:
            self.choice.unlink(missing_ok=True)
            relabelled = any(key.startswith(inputs.LABELS) for key in trained_on)
            for made in (self.start, self.validation, *([self.labelled] if relabelled else [])):
                shutil.rmtree(made, ignore_errors=True)
        write_json(self.inputs, inputs.merged(held, now))

    def _refuse(self, changed: Mapping[str, str], since: str) -> None:
        if changed:
            advice = "restore it, give the run another name (name=...), or remove the folder"
            raise RecipeError(
                str(self.path), [f"{key}: {words} has changed {since}: {advice}" for key, words in changed.items()]
            )

    def _note_provenance(self) -> None:
        runs: list[Any] = []
        if self.provenance.exists():
            runs = json.loads(self.provenance.read_text(encoding="utf-8"))
        write_json(self.provenance, [*runs, provenance()])


def exported_in(given: Path) -> Path:
    """Return the drafter folder for a path: the path itself in any format, or the drafter that its run exported.

    Raises:
        CheckpointError: The path is neither.
    """
    run = RunFolder(given)
    for place in (given, run.drafter, run.rejected("drafter")):
        if (place / "config.json").is_file() or (place / ABOUT).is_file():
            return place
    raise CheckpointError(f"{given}: neither a drafter folder nor a run with an exported drafter")


def _labelling(recipe: Recipe) -> Recipe:
    """Return the part of a recipe that labels of draft tokens depend on."""
    return replace(recipe, name="", train=TrainSettings(), eval=EvalSettings(), export=ExportSettings())


def _training_settings(recipe: Recipe, *, done: bool) -> Recipe:
    """Return the part of a recipe that the weights depend on; until the training is done, this includes eval and export."""
    data = replace(recipe.data, states=BuiltinStates(), cache_while_training=False)
    recipe = replace(recipe, name="", data=data, train=recipe.train.without_layout())
    if done:
        return replace(recipe, eval=EvalSettings(), export=ExportSettings())
    return replace(recipe, export=replace(recipe.export, require={}, step=None))
