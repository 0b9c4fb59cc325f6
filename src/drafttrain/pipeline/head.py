"""The stages of a recipe that trains a head: annotate, train, export."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import world

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe
    from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens
    from drafttrain.data_gen.training_data import TrainingData
    from drafttrain.eval.result import HeadFigures
    from drafttrain.heads import MadeFor
    from drafttrain.pipeline.folder import RunFolder
    from drafttrain.target_model import Target


def labelled_tokens(recipe: Recipe, folder: RunFolder, target: Target, data: TrainingData) -> LabelledTokens:
    """Return the labelled draft tokens of a run; those of an earlier run of the same recipe are taken up."""
    from drafttrain.checkpoint import read_drafter
    from drafttrain.data_gen.annotate import Frozen
    from drafttrain.data_gen.stored.labelled_tokens import annotate
    from drafttrain.target_model.folders import resolve_folder

    drafter = read_drafter(resolve_folder(recipe.head.drafter), target).eval().requires_grad_(False)
    frozen = Frozen(target, drafter, recipe.seed, layer=getattr(recipe.head, "layer", -1))
    return annotate(recipe.data.annotate, data, frozen, folder.data / "labelled")


def fit_head(recipe: Recipe, folder: RunFolder, labelled: LabelledTokens) -> None:
    """Train the head, or take up what an earlier run trained; its untrained start is kept beside it."""
    if folder.train_done.exists():
        say("training: done before, skipped")
        return
    import torch

    from drafttrain.data_gen.stored.labelled_tokens import RowOrder
    from drafttrain.eval.head_figures import held_out_estimate
    from drafttrain.heads import TokenHead, heads
    from drafttrain.target_model.device import pick_device
    from drafttrain.train.run import train_head

    torch.manual_seed(recipe.seed)
    head: TokenHead = heads.build(recipe.head, labelled.hidden_size)
    with first_before_others("it writes the head's start"):
        if not folder.start.exists():
            with folder_beside(folder.start) as temporary:
                head.save(temporary)
    head.to(pick_device(recipe.target.device))
    settings = recipe.train
    say(f"training {sum(p.numel() for p in head.parameters()):,} parameters for {settings.max_steps:,} steps")
    here = world()
    order = RowOrder(labelled.train, head, seed=recipe.seed)
    train_head(
        head,
        of_step=lambda step: order.of_step(
            step,
            batch_size=settings.batch_size,
            records_per_device=settings.records_per_device,
            rank=here.rank,
            world_size=here.size,
        ),
        estimate=lambda trained: held_out_estimate(trained, labelled.held_out),
        settings=settings,
        folder=folder.train,
    )


def export_trained_head(recipe: Recipe, folder: RunFolder, target: Target, *, trained: Path) -> None:
    """Write the folder of the head."""
    from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens
    from drafttrain.export.head import export_head

    export_head(
        trained,
        folder.head,
        kind=recipe.head.kind,
        held_out=LabelledTokens(folder.data / "labelled").held_out,
        made_for=_made_for(recipe, target),
        dtype=recipe.export.dtype,
    )


def _made_for(recipe: Recipe, target: Target) -> MadeFor:
    from drafttrain.heads import MadeFor
    from drafttrain.target_model.folders import fingerprint_of, resolve_folder

    drafter = recipe.head.drafter
    return MadeFor(target.name, target.fingerprint, drafter, fingerprint_of(resolve_folder(drafter)))


def exported_head(folder: RunFolder) -> Path:
    """Return the head of a run, the rejected one where it did not pass the gate.

    Raises:
        CheckpointError: None was exported yet.
    """
    for path in (folder.head, folder.rejected_head):
        if path.exists():
            return path
    raise CheckpointError(f"{folder.path}: no head was exported here yet: drafttrain fit does all stages")


def with_own_head(settings: Any, head: Path) -> Any:
    """Return settings in which every length policy and rule that names no head reads this one."""
    if isinstance(settings, list):
        return [with_own_head(item, head) for item in settings]
    if not is_dataclass(settings) or isinstance(settings, type):
        return settings
    names = [name for name in ("length", "also", "rule") if hasattr(settings, name)]
    changes: dict[str, Any] = {name: with_own_head(getattr(settings, name), head) for name in names}
    if getattr(settings, "head", "") is None:
        changes["head"] = str(head)
    return replace(settings, **changes)


def figures_of_head(recipe: Recipe, folder: RunFolder) -> HeadFigures:
    """Return what the exported head says of the held-out draft tokens."""
    from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens
    from drafttrain.eval.head_figures import head_figures

    rows = LabelledTokens(folder.data / "labelled").held_out
    return head_figures(exported_head(folder), folder.start, rows, kind=recipe.head.kind)
