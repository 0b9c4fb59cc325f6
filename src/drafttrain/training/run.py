"""One training: from an initialised drafter or head to a folder with the best weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from drafttrain.core.batches import DraftBatch, Late
from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import write_json
from drafttrain.distributed.collectives import agree, wait_for_all
from drafttrain.distributed.world import is_first, world
from drafttrain.drafters import Drafter
from drafttrain.heads import TokenHead
from drafttrain.heads.rows import HeadBatch
from drafttrain.losses import Loss
from drafttrain.target_model import Target
from drafttrain.training.callbacks import FrozenTarget, Progress
from drafttrain.training.checkpoints import Checkpoints, newest_checkpoint_for_all, save_trained
from drafttrain.training.compiled import compile_step
from drafttrain.training.distill import DistillModule
from drafttrain.training.head import HeadModule
from drafttrain.training.loader import Drawing, StepData
from drafttrain.training.memory import advice_on_memory
from drafttrain.training.metrics_log import MetricsLog
from drafttrain.training.precision import float32_products, note_on_float32
from drafttrain.training.preflight import check_disk, has_room_for_a_copy
from drafttrain.training.profile import Profile
from drafttrain.training.result import TrainResult, folder_of_step
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule
from drafttrain.training.strategy import ZeroStrategy
from drafttrain.training.validation import HeldOut, Validation


def train(
    drafter: Drafter,
    loss: Loss,
    *,
    target: Target | None,
    of_step: Callable[[int], Sequence[DraftBatch | Late]],
    estimate: Callable[[Any], Mapping[str, Any]] | None,
    settings: TrainSettings,
    vocab_size: int,
    folder: Path,
    drawing: Drawing | None = None,
) -> TrainResult:
    """Train a drafter, continuing from the newest checkpoint in `folder` if there is one.

    Args:
        of_step: The micro-batches of an optimizer step on this rank; a thread calls it, so it must leave all models alone.
        estimate: From a drafter to `OF_DRAFTERS` and `message` on held-out prompts.
        folder: Gets metrics.csv, checkpoints/, best/ and train.json.
        drawing: What draws the late micro-batches of `of_step`.

    Raises:
        Interrupted: On SIGTERM or SIGINT, after a checkpoint was saved.
    """
    if settings.compile:
        compile_step(drafter, loss)
    if settings.activation_checkpointing:
        drafter.recompute_activations()
    module = DistillModule(
        drafter, loss, target=target, settings=settings, vocab_size=vocab_size, draws=drawing is not None
    )
    held_out = HeldOut(estimate) if estimate else None
    frozen = [FrozenTarget(target)] if target else []
    for one in frozen:
        agree("the target's files (fingerprint)", one.target.fingerprint)
        agree("the target's weights in memory (digest)", one.before[:12])
    return _fit(module, of_step, held_out=held_out, frozen=frozen, folder=folder, drawing=drawing)


def train_head(
    head: TokenHead,
    *,
    of_step: Callable[[int], list[HeadBatch]],
    estimate: Callable[[Any], Mapping[str, Any]],
    settings: TrainSettings,
    folder: Path,
) -> TrainResult:
    """Train a head on labelled draft tokens, continuing from the newest checkpoint in `folder` if there is one.

    Args:
        of_step: The micro-batches of an optimizer step; a thread calls it.
        estimate: From a head to `{"log_likelihood", "auc", "ece", "message"}` on held-out tokens.
        folder: Gets metrics.csv, checkpoints/, best/ and train.json.

    Raises:
        Interrupted: On SIGTERM or SIGINT, after a checkpoint was saved.
    """
    held_out = HeldOut(estimate, ("log_likelihood", "auc", "ece"), best_by="log_likelihood")
    return _fit(HeadModule(head, settings=settings), of_step, held_out=held_out, frozen=[], folder=folder)


def _fit(
    module: StepModule,
    of_step: Callable[[int], Sequence[Any]],
    *,
    held_out: HeldOut | None,
    frozen: Sequence[FrozenTarget],
    folder: Path,
    drawing: Drawing | None = None,
) -> TrainResult:
    settings, device = module.settings, next(module.trained.parameters()).device
    if note := note_on_float32(settings, device, frozen[0].target if frozen else None):
        say(note)
    wait_for_all("they begin to train")
    # Drafters and heads are loaded in evaluation mode.
    module.trained.train()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    num_trained = sum(p.numel() for p in module.trained.parameters() if p.requires_grad)
    check_disk(checkpoints, num_trained=num_trained, keep=settings.keep_checkpoints)
    validation = (
        Validation(held_out, settings=settings, folder=folder) if held_out and settings.eval_every_steps else None
    )
    saver = Checkpoints(checkpoints, settings=settings, copies=has_room_for_a_copy(num_trained))
    callbacks = [
        *([validation] if validation else []),
        MetricsLog(folder / "metrics.csv", settings=settings, validation=validation),
        saver,
        Progress(settings),
        *frozen,
        *(
            [Profile((settings.profile_steps[0], settings.profile_steps[1]), folder=folder)]
            if settings.profile_steps
            else []
        ),
    ]
    with _quiet():
        trainer = Trainer(
            **placement(device, settings),
            max_steps=settings.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.num_micro_batches(world().size),
            callbacks=callbacks,
            logger=_loggers(settings, folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        trainer.strategy.checkpoint_io = saver.file
        # Before every micro-batch Lightning would broadcast whether a signal came, and wait: `saver` handles signals instead.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        newest = newest_checkpoint_for_all(checkpoints)
        if newest:
            say(f"continuing from {newest}")
        data = StepData(of_step, planned=module.planned, made=module.made, stop=settings.max_steps, drawing=drawing)
        on_device = float32_products(settings, device)
        with advice_on_memory(module), saver.taking_requests(), on_device, closing(data):
            trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)
    return _finish(module, validation, folder=folder)


def placement(device: torch.device, settings: TrainSettings) -> dict[str, Any]:
    """Return Lightning's arguments for training on the device of the drafter and its target.

    Several processes, or a recipe with a section `train.deepspeed`, train under DeepSpeed.
    """
    here = world()
    alone = here.size == 1
    # Each process has the device of its local rank, whether it sees all devices of the machine or only its own.
    visible = torch.cuda.device_count() if device.type == "cuda" else here.local_size
    own = [device.index or 0] if alone else list(range(min(here.local_size, visible)))
    placed = {
        "accelerator": device.type,
        "devices": len(own) if device.type == "cpu" else own,
        "num_nodes": here.size // here.local_size,
    }
    if alone and settings.deepspeed is None:
        return placed | {"precision": "bf16-mixed" if settings.precision == "bf16-mixed" else "32-true"}
    return placed | {"strategy": ZeroStrategy(settings, device=device, here=here)}


def _finish(module: StepModule, validation: Validation | None, *, folder: Path) -> TrainResult:
    save_trained(module, folder / "last")
    steps = module.settings.max_steps
    if validation is None or not validation.kept:
        result = TrainResult("last", steps, steps)
    else:
        name = validation.held_out.best_by
        chosen, last = validation.kept[0], validation.last[name]
        best, weights = chosen[name], folder_of_step(folder, chosen["step"]).relative_to(folder)
        result = TrainResult(str(weights), chosen["step"], steps, name, best, last)
        say(
            f"best step {result.best_step} ({name.replace('_', ' ')} {best:.3f} on held-out data), last step {steps} ({last:.3f}): "
            "the best is exported"
        )
    if is_first():
        write_json(folder / "train.json", asdict(result))
    return result


def _loggers(settings: TrainSettings, folder: Path) -> list[Any]:
    from lightning.pytorch import loggers

    made: list[Any] = []
    for name in settings.loggers:
        try:
            if name == "tensorboard":
                made.append(loggers.TensorBoardLogger(folder, name="tensorboard", version=""))
            elif name == "wandb":
                made.append(loggers.WandbLogger(save_dir=folder, name=folder.name, project="drafttrain"))
            elif name == "mlflow":
                made.append(loggers.MLFlowLogger(run_name=folder.name, save_dir=str(folder / "mlruns")))
        except ModuleNotFoundError as error:
            raise DrafttrainError(f"train.loggers: {name} cannot be used: {error}") from error
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's own log lines."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            log.setLevel(level)
