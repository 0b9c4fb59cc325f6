"""One training: from a drafter at its start to the best weights in a folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import write_json
from drafttrain.core.records import DraftBatch
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.target import Target
from drafttrain.train.callbacks import (
    Checkpoints,
    FrozenTarget,
    MetricsLog,
    Progress,
    Validation,
    newest_checkpoint,
    save_drafter,
)
from drafttrain.train.module import DistillModule
from drafttrain.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainResult:
    """Where the best weights are and when they were reached."""

    drafter: str
    best_step: int
    last_step: int
    best_block_efficiency: float | None
    """By replay on the validation prompts; None when the recipe asks for no validation."""
    last_block_efficiency: float | None


class Steps(torch.utils.data.IterableDataset[DraftBatch]):
    """Micro-batches from a step on; `of_step` is a pure function, so a resume needs one integer."""

    def __init__(self, of_step: Callable[[int], list[DraftBatch]], *, start: int, stop: int) -> None:
        self.of_step = of_step
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[DraftBatch]:
        for step in range(self.start, self.stop):
            yield from self.of_step(step)


class _Module(DistillModule):
    """The training step with its data: Lightning asks for the loader after a checkpoint was restored."""

    def __init__(self, *args: Any, of_step: Callable[[int], list[DraftBatch]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._of_step = of_step

    def train_dataloader(self) -> Any:
        steps = Steps(self._of_step, start=self.trainer.global_step, stop=self.settings.max_steps)
        return torch.utils.data.DataLoader(steps, batch_size=None)


def train(
    drafter: Drafter,
    loss: Loss,
    *,
    target: Target | None,
    of_step: Callable[[int], list[DraftBatch]],
    estimate: Callable[[Any], Mapping[str, Any]] | None,
    settings: TrainSettings,
    vocab_size: int,
    folder: Path,
) -> TrainResult:
    """Train, continuing from the newest checkpoint in `folder` if there is one.

    Args:
        of_step: The micro-batches of an optimizer step on this rank.
        estimate: From a drafter to `{"block_efficiency", "alpha", "by_length"}` on held-out prompts.
        folder: Gets metrics.csv, checkpoints/, best/ and train.json.

    Raises:
        Interrupted: On SIGTERM or SIGINT, after a checkpoint was saved.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    module = _Module(drafter, loss, target=target, settings=settings, vocab_size=vocab_size, of_step=of_step)
    validation = (
        Validation(estimate, settings=settings, folder=folder) if estimate and settings.eval_every_steps else None
    )
    saver = Checkpoints(checkpoints, settings=settings)
    callbacks = [
        *([validation] if validation else []),
        MetricsLog(folder / "metrics.csv", settings=settings, validation=validation),
        saver,
        Progress(settings),
        *([FrozenTarget(target)] if target else []),
    ]
    with _quiet():
        trainer = Trainer(
            **placement(next(drafter.parameters()).device),
            precision="32-true" if settings.precision == "fp32" else "bf16-mixed",
            max_steps=settings.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulation,
            callbacks=callbacks,
            logger=_loggers(settings, folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        newest = newest_checkpoint(checkpoints)
        if newest:
            say(f"continuing from {newest}")
        with saver.taking_requests():
            trainer.fit(module, ckpt_path=newest, weights_only=True)
    return _finish(module, validation, settings=settings, folder=folder)


def placement(device: torch.device) -> dict[str, Any]:
    """Return what Lightning must be told so that it trains where the drafter is, and its target with it."""
    return {"accelerator": device.type, "devices": 1 if device.type == "cpu" else [device.index or 0]}


def _finish(
    module: DistillModule, validation: Validation | None, *, settings: TrainSettings, folder: Path
) -> TrainResult:
    save_drafter(module, folder / "last")
    if validation is None:
        result = TrainResult("last", settings.max_steps, settings.max_steps, None, None)
    else:
        result = TrainResult(
            "best",
            validation.best["step"],
            settings.max_steps,
            validation.best["block_efficiency"],
            validation.latest["block_efficiency"],
        )
        say(
            f"best step {result.best_step} (block efficiency by replay {result.best_block_efficiency:.3f}), "
            f"last step {result.last_step} ({result.last_block_efficiency:.3f}): the best is exported"
        )
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
    """Silence what Lightning says of itself; our own lines say what a user needs."""
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
