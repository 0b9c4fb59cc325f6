"""A recipe at work in its folder: what runs of every kind share, and what each kind must do.

`DrafterRun` trains a drafter, `HeadRun` a head; `kind_of_run` picks the one that a recipe asks for.
"""

from __future__ import annotations

import functools
import json
import os
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers

from drafttrain.config.dump import dump_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.memory import return_memory
from drafttrain.data_gen.states import states
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import is_first
from drafttrain.eval.result import Result
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.folder import RunFolder
from drafttrain.target_model import Target
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.tokenizer import load_target_tokenizer, num_ids
from drafttrain.training.result import TrainResult, folder_of_step, kept_steps

Opening = Literal["train", "evaluate", "join"]


class Run(ABC):
    """A recipe at work in its folder; its stages share what is loaded.

    Args:
        placement: Where the target is during data generation and training (`train.target_placement`).
        opening: `evaluate`: nothing is trained, so inputs that only a training reads are not checked. `join`: another process has
            opened the folder for the same recipe, so its files stay as they are.
    """

    what: ClassVar[str]
    """What is trained, and the name of its folder: drafter or head."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        placement: str = "replicated",
        opening: Opening = "train",
    ) -> None:
        quiet_libraries()
        self.placement = placement
        self.folder = RunFolder(folder)
        with first_before_others("it opens the run folder"):
            # The others read the number types that the first process chose.
            recipe = resolve_auto_types(recipe, self.folder.stored_recipe())
            if is_first() and opening != "join":
                self.folder.open(recipe, evaluates_only=opening == "evaluate")
        self.recipe = recipe
        self.resolved = dump_recipe(recipe)
        if recipe.train.num_threads:
            torch.set_num_threads(recipe.train.num_threads)

    @abstractmethod
    def prepare(self) -> None:
        """Make the data that the training reads, once its texts are there: records, cached target outputs, labels."""

    @abstractmethod
    def train(self) -> None:
        """Train from the start, or continue where an earlier run stopped; skipped when it is done."""

    @abstractmethod
    def export(self, done: TrainResult) -> None:
        """Write the exported folder from the weights of the training."""

    @abstractmethod
    def evaluate(self) -> Result:
        """Evaluate the exported files; return what eval.json holds."""

    @abstractmethod
    def card(self, result: Result, *, command: str) -> str:
        """Return the README of the exported folder."""

    @abstractmethod
    def weights_so_far(self) -> TrainResult:
        """Return the weights of a training that has not ended and has no validated step yet.

        Raises:
            DrafttrainError: There are none.
        """

    def cache_target(self, data: TrainingData) -> None:  # noqa: B027  a head reads labels, and nothing is cached for it
        """Cache the target's outputs on the training data, where the recipe asks for it."""

    def export_best(self) -> TrainResult:
        """Export the best weights of the training, and return its result."""
        done = self.training_result()
        self.export(done)
        return done

    def training_result(self) -> TrainResult:
        """Return the result of the training; with `export.step` that step, and before the training has ended the best step so far.

        Raises:
            DrafttrainError: There are no such weights.
        """
        folder, step = self.folder, self.recipe.export.step
        done = None
        if folder.train_done.exists():
            done = TrainResult(**json.loads(folder.train_done.read_text(encoding="utf-8")))
        if done and step is None:
            return done
        kept = {one["step"]: one for one in kept_steps(folder.train)}
        if step is not None and step not in kept:
            there = ", ".join(map(str, sorted(kept))) or "none"
            raise DrafttrainError(
                f"{folder.path}: no weights of step {step} were kept, only of steps {there} (train.keep_best)"
            )
        if not kept:
            return self.weights_so_far()
        chosen = next(iter(kept)) if step is None else step
        weights = str(folder_of_step(folder.train, chosen).relative_to(folder.train))
        if done:
            return replace(done, drafter=weights, best_step=chosen, best=kept[chosen][done.best_by])
        say(f"the training is not finished: step {chosen} of {self.recipe.train.max_steps} is exported")
        return TrainResult(weights, chosen, chosen)

    def has_target(self) -> bool:
        """Return whether the recipe names a target."""
        return self.recipe.target.model is not None

    @functools.cached_property
    def target(self) -> Target:
        """The target, loaded when it is first asked for."""
        target = self._load_target()
        target.check_length(self.recipe.data.max_length, what="data.max_length")
        return target

    def _load_target(self) -> Target:
        if self.placement == "absent":
            data, settings = self.recipe.data, self.recipe.eval
            return states.build(data.states).target(
                self.recipe.target,
                max_length=max(data.max_length, (settings.prompt_tokens or 0) + settings.max_new_tokens),
                while_training=data.cache == "none",
            )
        if self.placement == "sharded":
            # It imports lightning, which an evaluation and an export run without.
            from drafttrain.training.sharded_target import ShardedTarget

            return ShardedTarget.load(self.recipe.target)
        return Target.load(self.recipe.target)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer, read without any weights."""
        return load_target_tokenizer(self.recipe.target)

    @functools.cached_property
    def images(self) -> ImageReader | None:
        """The reader of the target's images, without any weights; None: `target.images` is false."""
        return ImageReader.load(self.recipe.target)

    @property
    def num_tokens(self) -> int:
        """Ids that target, drafter and tokenizer share."""
        return self.target.num_tokens if self.has_target() else num_ids(self.tokenizer)

    def continue_alone(self) -> None:
        """Continue in this process alone: a target that is spread over all processes cannot be run any more."""
        if self.placement == "sharded":
            self.placement = "absent"
            self.release()

    def release(self) -> None:
        """Release the loaded models, and return the memory of this process and its device; they are loaded again when they are asked for."""
        self.__dict__.pop("target", None)
        return_memory()


def quiet_libraries() -> None:
    """Silence the bars and hints of transformers; our own lines hold what a user needs."""
    # DeepSpeed, which Lightning imports, would otherwise warn that it had to look for a device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
