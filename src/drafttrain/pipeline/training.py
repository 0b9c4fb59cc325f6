"""The stage that trains a drafter: from its start, pretrained or not, to its best step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drafttrain.core.console import say
from drafttrain.distributed.collectives import first_before_others, shared, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.pipeline.data import loss_of, own_batches, training_data
from drafttrain.pipeline.drafter_folder import export_weights, write_drafter

if TYPE_CHECKING:
    from drafttrain.data_gen.training_data import TrainingData
    from drafttrain.drafters import Drafter
    from drafttrain.pipeline.run import Run
    from drafttrain.target_model import Target


def train_drafter(run: Run) -> None:
    """Train from the start to the best step, or continue where an earlier run stopped; skipped when it is done."""
    if run.folder.train_done.exists():
        say("training: done before, skipped")
        return
    wait_for_all("they begin to train")
    from drafttrain.train.run import train

    recipe = run.recipe
    data = training_data(run)
    target = cached_target = None
    if run.has_target():
        target, cached_target = run.target, run.cached_target
        target.rest()
    drafter = start_of(run, data)
    loss = loss_of(recipe)
    settings = recipe.train
    say(f"training {num_trained(drafter):,} parameters for {settings.max_steps:,} steps")
    train(
        drafter,
        loss,
        target=target if loss.needs_target or drafter.needs() != _nothing() else None,
        of_step=own_batches(data, settings, device=device_of(drafter)),
        estimate=_estimator(run, cached_target) if cached_target is not None else None,
        settings=settings,
        vocab_size=run.num_tokens,
        folder=run.folder.train,
    )
    if is_first():
        run.folder.drop_figures()


def start_of(run: Run, data: TrainingData) -> Drafter:
    """Return the drafter as distillation finds it, and keep it as a folder: made as its settings say, then pretrained or not."""
    recipe, start = run.recipe, run.folder.start
    if recipe.train.pretrain is None:
        run.drafter.fit_vocabulary(data.label_counts)
        with first_before_others("it writes the drafter's start"):
            write_drafter(run, run.drafter, start, steps=0)
        return run.drafter
    if not all(shared(start.exists())):
        _pretrain(run, data.plain())
    return run.new_drafter(replace(recipe.drafter, init="checkpoint", checkpoint=str(start)))


def _pretrain(run: Run, plain: TrainingData) -> None:
    """Train on plain text with cross-entropy, and export that as the start."""
    from drafttrain.losses.ce import CrossEntropy
    from drafttrain.train.run import train

    settings, folder = run.recipe.train.of_pretraining(), run.folder.pretrain
    drafter = run.drafter
    say(f"pretraining {num_trained(drafter):,} parameters for {settings.max_steps:,} steps")
    done = train(
        drafter,
        CrossEntropy(),
        target=None,
        of_step=own_batches(plain, settings, device=device_of(drafter)),
        estimate=None,
        settings=settings,
        vocab_size=run.num_tokens,
        folder=folder,
    )
    with first_before_others("it writes the drafter's start"):
        if is_first():
            export_weights(run, folder / done.drafter, run.folder.start, steps=done.last_step)


def device_of(drafter: Drafter) -> Any:
    """Return where a drafter is trained."""
    return next(drafter.parameters()).device


def num_trained(drafter: Drafter) -> int:
    return sum(p.numel() for p in drafter.parameters() if p.requires_grad)


def _nothing() -> Any:
    from drafttrain.core.target_rows import TargetNeeds

    return TargetNeeds()


def _estimator(run: Run, target: Target) -> Callable[[Any], Mapping[str, Any]]:
    """Return the estimate of a drafter on the validation prompts: replay on what the target writes, written once."""
    from drafttrain.eval.replay import expected_rounds, replay_rows

    wanted = run.recipe.eval
    texts, sampling = run.validation_texts
    tokens = sum(len(text.new) for text in texts)
    length = getattr(wanted.length, "depth", getattr(wanted.length, "num_draft_tokens", 5))
    lengths = sorted({*wanted.replay_lengths, length})

    def estimate(drafter: Any) -> dict[str, Any]:
        with drafter.standing_on(target):
            rows = replay_rows(target, drafter, texts, sampling, num_depths=max(lengths))
        by_length = {k: tokens / sum(expected_rounds(r, k) for r in rows) for k in lengths}
        alpha = sum(float(r.acceptance_T.sum()) for r in rows) / tokens
        said = "  ".join(f"K={k}: {value:.2f}" for k, value in by_length.items())
        return {
            "block_efficiency": by_length[length],
            "alpha": alpha,
            "said": f"block efficiency by replay {said}  alpha {alpha:.3f}",
        }

    return estimate
