"""The run of a recipe with a section `online`, and its report."""

from __future__ import annotations

from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.data_gen.encoder import Encoder
from drafttrain.losses import losses
from drafttrain.online.loop import OnlineRun
from drafttrain.online.report import write_online_report
from drafttrain.online.route import OnlineSetup
from drafttrain.pipeline.folder import RunFolder
from drafttrain.recorder.intake import Intake
from drafttrain.target_model import Target


def online_run(recipe: Recipe, folder: RunFolder, target: Target) -> OnlineRun:
    """Return the online run of a recipe, resumed if it has a state. `start/` must exist."""
    assert recipe.online is not None
    intake = Intake(
        recipe.data.sources[0],
        Encoder(target.tokenizer, recipe.data.max_length),
        folder.path / "online" / "intake",
        about=target.tokenizer_fingerprint,
    )
    setup = OnlineSetup(
        target=target,
        online=recipe.online,
        train=recipe.train,
        loss=lambda: losses.build(recipe.loss),
        max_length=recipe.data.max_length,
        num_draft_tokens=recipe.eval.length.chain_length,
        dtype=recipe.export.dtype,
        seed=recipe.seed,
        drafter=recipe.drafter,
    )
    return OnlineRun(setup, intake, folder.path, start=folder.start)


def report(folder: RunFolder, *, title: str) -> None:
    """Write the report of the run."""
    write_online_report(folder.path, folder.report, title=title)
    say(f"report:  {folder.report}")
