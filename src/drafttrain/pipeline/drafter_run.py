"""The run that trains a drafter: from its start, pretrained or not, to the best weights as a drafter folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from drafttrain.checkpoint import About
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DataError, DrafttrainError
from drafttrain.core.files import folder_beside, write_json
from drafttrain.core.foreign import read_json
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.vocabulary import share_of_tokens
from drafttrain.data_gen.on_policy import OnPolicyData
from drafttrain.data_gen.stored.arriving import Arriving
from drafttrain.data_gen.training_data import TrainingData, attach_cache, attach_notes
from drafttrain.distributed.collectives import first_before_others, shared, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.drafters import Drafter, drafters
from drafttrain.eval.result import Result
from drafttrain.export.drafter import CalibrationTexts, DrafterExporter
from drafttrain.losses import Loss, losses
from drafttrain.losses.ce import CrossEntropy
from drafttrain.pipeline.cache_process import CacheProcess
from drafttrain.pipeline.data import contaminated_prompts, encoded_data, own_batches, say_how_full, training_data
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.run import Run
from drafttrain.pipeline.validation import Validation
from drafttrain.serving.card import model_card
from drafttrain.target_model import Target
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.tokenizer import num_ids, tokenizer_fingerprint
from drafttrain.training.result import TrainResult
from drafttrain.training.settings import TrainSettings


class DrafterRun(Run):
    """A run that trains a drafter."""

    what: ClassVar[str] = "drafter"

    def prepare(self) -> None:
        """Encode the sources and cache the target's outputs on them."""
        if self.recipe.data.cache_while_training:
            self.write_cache()
        self._noted(training_data(self))
        if self.placement == "absent":
            # The training reads it, and may have no target that could be run.
            _ = self.validation.target

    def train(self) -> None:
        """Train from the start to the best step, or continue where an earlier run stopped; skipped when it is done."""
        if self.folder.train_done.exists():
            say("training: done before, skipped")
            return
        wait_for_all("they begin to train")
        data = self._noted(training_data(self))
        if self.has_target():
            _ = self.target, self.validation.target
            self.target.release()
        if self._arriving.missing:
            self._cache_process.start()
        try:
            self._distil(data)
        finally:
            self._cache_process.close()

    def _noted(self, data: TrainingData) -> TrainingData:
        """Return the data with what the target notes about its texts, if the drafter is trained on notes."""
        recipe = self.recipe
        component: Any = drafters.entry(recipe.drafter.kind).component
        notes = component.notes(recipe.drafter)
        if notes is not None:
            target, count = self.target, recipe.train.max_steps * recipe.train.batch_size
            with first_before_others(f"it notes {notes.name}"):
                attach_notes(data, self.folder.data, target, notes, num_records=count, seed=recipe.seed)
        return data

    def _distil(self, data: TrainingData) -> None:
        drafter, loss = self.start(data), self.loss()
        reads_target = loss.needs_target or drafter.needs() != TargetNeeds()
        self._trained(
            "training",
            drafter,
            loss,
            self._drawing(data, drafter) or data,
            self.recipe.train,
            target=self.target if self.has_target() and reads_target else None,
            estimator=self.validation.estimator if self.has_target() else None,
            folder=self.folder.train,
        )
        if is_first():
            self.folder.remove_results()

    def _drawing(self, data: TrainingData, drafter: Drafter) -> OnPolicyData | None:
        """Return the data with answers of the drafter in training; None: the recipe asks for none."""
        settings, train = self.recipe.data.on_policy, self.recipe.train
        if settings is None or not settings.fraction:
            return None
        drawing = OnPolicyData(
            data,
            settings,
            drafter=drafter.language_model,
            target=self.target,
            num_steps=train.max_steps,
            seed=self.recipe.seed,
        )
        drawing.say_cost(batch_size=train.batch_size)
        return drawing

    def start(self, data: TrainingData) -> Drafter:
        """Return the drafter as distillation finds it, pretrained or not, and export it as the run's start."""
        if self.recipe.train.pretrain is None:
            self.drafter.fit_vocabulary(data.label_counts)
            self._report_vocabulary()
            with first_before_others("it writes the drafter's start"):
                self.write_start()
            return self.drafter
        if not all(shared(self.folder.start.exists())):
            self._pretrain(data.plain())
        return self.new_drafter(replace(self.recipe.drafter, init="checkpoint", checkpoint=str(self.folder.start)))

    def _report_vocabulary(self) -> None:
        """Print the share of the validation texts that a vocabulary chosen on training text can draft."""
        vocabulary = getattr(self.drafter, "vocabulary", None)
        if vocabulary is not None and self.has_target():
            share = share_of_tokens([text.new for text in self.validation.texts], vocabulary)
            say(
                f"draft vocabulary: {len(vocabulary):,} tokens, {share:.2%} of the target's tokens on the validation prompts"
            )

    def write_start(self, *, steps: int = 0) -> None:
        """Export the drafter in memory as the run's start, unless there is one."""
        if not self.folder.start.exists():
            self.exporter().from_memory(self.drafter, self.folder.start, steps=steps)

    def _pretrain(self, plain: TrainingData) -> None:
        """Train on plain text with cross-entropy, and export the result as the start."""
        settings, folder = self.recipe.train.of_pretraining(), self.folder.pretrain
        done = self._trained("pretraining", self.drafter, CrossEntropy(), plain, settings, folder=folder)
        with first_before_others("it writes the drafter's start"):
            if is_first():
                self.exporter().from_weights(folder / done.drafter, self.folder.start, steps=done.last_step)

    def _trained(
        self,
        what: str,
        drafter: Drafter,
        loss: Loss,
        data: TrainingData | OnPolicyData,
        settings: TrainSettings,
        *,
        target: Target | None = None,
        estimator: Callable[[], Callable[[Any], Mapping[str, Any]]] | None = None,
        folder: Path,
    ) -> TrainResult:
        # It imports lightning, which an evaluation and an export run without.
        from drafttrain.training.run import train

        parameters = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
        device = next(drafter.parameters()).device
        say(f"{what} {parameters:,} parameters for {settings.max_steps:,} steps")
        if isinstance(data, TrainingData):
            say_how_full(data, settings, device=device)
        return train(
            drafter,
            loss,
            target=target,
            of_step=own_batches(data, settings, device=device),
            estimate=estimator() if estimator else None,
            settings=settings,
            vocab_size=self.num_tokens,
            folder=folder,
            drawing=data if isinstance(data, OnPolicyData) else None,
        )

    def export(self, done: TrainResult) -> None:
        """Write the drafter folder from the weights of the training."""
        self.exporter().from_weights(self.folder.train / done.drafter, self.folder.drafter, steps=done.best_step)

    def exporter(self) -> DrafterExporter:
        """Return what writes the drafter folders of this run."""
        recipe = self.recipe
        about = About(
            kind=recipe.drafter.kind,
            target=recipe.target.model or "",
            target_fingerprint=self.target.fingerprint if self.has_target() else "",
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            vocab_size=num_ids(self.tokenizer),
            trained_steps=0,
            draft=recipe.drafter.draft,
        )
        return DrafterExporter(about, self.tokenizer, recipe.export.dtype, self._calibration)

    def _calibration(self) -> CalibrationTexts:
        return CalibrationTexts(self.validation.texts, self.validation.target)

    def weights_so_far(self) -> TrainResult:
        """Write the weights of the newest checkpoint as `last/`."""
        # They import lightning, which an export of a training that has ended runs without.
        from drafttrain.training.checkpoints import newest_checkpoint, weights_of_checkpoint

        folder = self.folder
        newest = newest_checkpoint(folder.train / "checkpoints")
        if newest is None:
            raise DrafttrainError(f"{folder.path}: no readable checkpoint. Run drafttrain fit first")
        reached, trained = weights_of_checkpoint(newest)
        # Without the cache, which another process may be writing.
        drafter = self.start(encoded_data(self))
        missing = {name for name, p in drafter.named_parameters() if p.requires_grad} - trained.keys()
        if missing:
            raise CheckpointError(f"{newest}: lacks weights of this recipe's drafter: {', '.join(sorted(missing)[:5])}")
        drafter.load_state_dict(trained, strict=False)
        with folder_beside(folder.train / "last") as temporary:
            drafter.save(temporary)
        say(f"the training is not finished: {newest} is exported")
        return TrainResult("last", reached, reached)

    def evaluate(self) -> Result:
        """Evaluate the exported drafter beside the run's own start."""
        settings = self.recipe.eval
        folders = {"drafter": self.folder.exported(self.what)}
        if settings.start and self.folder.start.exists():
            folders["start"] = self.folder.start
        return evaluate_folders(
            folders,
            self.target,
            settings,
            dropped=contaminated_prompts(self, settings.prompts),
            unfinished=self.folder.unfinished,
        )

    def card(self, result: Result, *, command: str) -> str:
        """Return the README of the drafter folder."""
        return model_card(self.recipe.name, result, drafter="drafter", recipe=self.resolved, command=command)

    def cache_target(self, data: TrainingData) -> None:
        """Cache what drafter and loss read of the target on the training data, where the recipe asks for it."""
        self._cache(data, self._arriving if self.recipe.data.cache_while_training else None)

    def write_cache(self) -> None:
        """Write the cache of a run that trains in another process meanwhile."""
        with first_before_others("it encodes the sources"):
            data = encoded_data(self)
        self._cache(data, None)

    def _cache(self, data: TrainingData, arriving: Arriving | None) -> None:
        recipe = self.recipe
        if recipe.data.cache == "none" or not self.has_target():
            return
        if reason := self.drafter.why_not_cached():
            raise DataError(f"data.cache: {recipe.drafter.kind}: {reason}; set data.cache: none")
        attach_cache(
            data,
            self.folder.data,
            self.target,
            num_records=recipe.train.max_steps * recipe.train.batch_size,
            distribution=self.loss().needs_target,
            own_vocabulary=self.drafter.vocabulary is not None,
            needs=self.drafter.needs(),
            arriving=arriving,
        )

    @functools.cached_property
    def _cache_process(self) -> CacheProcess:
        return CacheProcess(self.folder.path)

    @functools.cached_property
    def _arriving(self) -> Arriving:
        """The shards that the other process writes."""
        return Arriving(lambda: self._cache_process.ended())

    def loss(self) -> Loss:
        """Return the loss of the recipe."""
        loss: Loss = losses.build(self.recipe.loss)
        return loss

    @functools.cached_property
    def validation(self) -> Validation:
        """The texts, target and estimate that the drafter is validated with."""
        return Validation(self, lambda: self.drafter.needs())

    @functools.cached_property
    def drafter(self) -> Drafter:
        """The drafter that the settings describe, before any training."""
        return self.new_drafter(self._chosen())

    def _chosen(self) -> Any:
        """Return the drafter's settings with what they leave to be chosen on training texts: chosen once, and stored."""
        given, path = self.recipe.drafter, self.folder.choice
        choice = cast(Any, drafters.entry(given.kind).component).start_choice(given)
        if choice is None:
            return given
        target = self.target
        with first_before_others(f"it chooses {choice.name}"):
            if not path.exists():
                write_json(path, choice.choose(target, encoded_data(self).first_records(choice.num_texts)))
        return choice.settings(read_json(path))

    def new_drafter(self, settings: Any) -> Drafter:
        """Return a drafter of these settings on `train.device`: by default the target's, or where a target would be."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        target = self.target if self.has_target() else None
        entry = cast(Any, drafters.entry(settings.kind).component)
        drafter: Drafter = entry.for_training(settings, target=target, tokenizer=self.tokenizer)
        if recipe.train.device != "auto":
            return drafter.to(pick_device(recipe.train.device))
        return drafter.to(target.device if target is not None else pick_device(recipe.target.device))

    def release(self) -> None:
        """Release target and drafter."""
        self.__dict__.pop("drafter", None)
        self.validation.release()
        super().release()
