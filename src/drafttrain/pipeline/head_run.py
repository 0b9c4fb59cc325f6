"""The run that trains a head on a frozen drafter and target: label draft tokens, train, export, evaluate."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, ClassVar

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import folder_beside
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens, RowOrder, annotate
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import world
from drafttrain.eval.head_figures import head_figures, held_out_estimate
from drafttrain.eval.result import Result
from drafttrain.export.head import export_head, head_card
from drafttrain.heads.token_head import MadeFor, TokenHead, heads
from drafttrain.pipeline.data import contaminated_prompts, training_data
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.run import Run
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.training.result import TrainResult


class HeadRun(Run):
    """A run that trains a head."""

    what: ClassVar[str] = "head"

    def prepare(self) -> None:
        """Encode the sources and label draft tokens."""
        self.label()

    def label(self) -> LabelledTokens:
        """Return the labelled draft tokens; those that an earlier run of the same recipe stored are loaded."""
        data, recipe = training_data(self), self.recipe
        with first_before_others("it labels draft tokens"):
            drafter = read_drafter(resolve_folder(recipe.head.drafter), self.target).eval().requires_grad_(False)
            frozen = Frozen(self.target, drafter, recipe.seed, layer=recipe.head.layer)
            return annotate(recipe.data.annotate, data, frozen, self.folder.labelled)

    def train(self) -> None:
        """Label draft tokens and train the head, or continue; its untrained start is stored too. Skipped when it is done."""
        self.fit_head(self.label())

    def fit_head(self, labelled: LabelledTokens) -> None:
        """Train the head on labelled draft tokens; skipped when it is done."""
        if self.folder.train_done.exists():
            say("training: done before, skipped")
            return
        # It imports lightning, which an evaluation and an export run without.
        from drafttrain.training.run import train_head

        settings, here = self.recipe.train, world()
        head = self._start(labelled)
        say(f"training {sum(p.numel() for p in head.parameters()):,} parameters for {settings.max_steps:,} steps")
        order = RowOrder(labelled.train, head, seed=self.recipe.seed)
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
            folder=self.folder.train,
        )

    def _start(self, labelled: LabelledTokens) -> TokenHead:
        """Return the untrained head on the target's device, and store it as the run's start."""
        torch.manual_seed(self.recipe.seed)
        head: TokenHead = heads.build(self.recipe.head, labelled.hidden_size)
        with first_before_others("it writes the head's start"):
            if not self.folder.start.exists():
                with folder_beside(self.folder.start) as temporary:
                    head.save(temporary)
        return head.to(pick_device(self.recipe.target.device))

    def export(self, done: TrainResult) -> None:
        """Write the folder of the head."""
        recipe = self.recipe
        drafter = recipe.head.drafter
        target = self.target
        export_head(
            self.folder.train / done.drafter,
            self.folder.head,
            kind=recipe.head.kind,
            held_out=LabelledTokens(self.folder.labelled).held_out,
            made_for=MadeFor(target.name, target.fingerprint, drafter, fingerprint_of(resolve_folder(drafter))),
            dtype=recipe.export.dtype,
        )

    def weights_so_far(self) -> TrainResult:
        """Refuse: only validated steps of a head are exported."""
        raise DrafttrainError(f"{self.folder.path}: the head has no validated step yet. Run drafttrain fit first")

    def evaluate(self) -> Result:
        """Evaluate the frozen drafter under the head's decisions, and the head on held-out draft tokens."""
        recipe, exported = self.recipe, self.folder.exported(self.what)
        result = evaluate_folders(
            {"drafter": resolve_folder(recipe.head.drafter)},
            self.target,
            with_own_head(recipe.eval, str(exported)),
            dropped=contaminated_prompts(self, recipe.eval.prompts),
            unfinished=self.folder.unfinished,
        )
        held_out = LabelledTokens(self.folder.labelled).held_out
        figures = head_figures(exported, self.folder.start, held_out, kind=recipe.head.kind)
        return replace(result, head=figures)

    def card(self, result: Result, *, command: str) -> str:
        """Return the README of the head's folder."""
        return head_card(self.recipe.name, result, recipe=self.resolved, command=command)


def with_own_head(settings: Any, head: str) -> Any:
    """Return settings in which every length policy and acceptance rule that names no head reads this one."""
    if isinstance(settings, list):
        return [with_own_head(item, head) for item in settings]
    if not is_dataclass(settings) or isinstance(settings, type):
        return settings
    names = [name for name in ("length", "also", "rule") if hasattr(settings, name)]
    changes: dict[str, Any] = {name: with_own_head(getattr(settings, name), head) for name in names}
    if getattr(settings, "head", "") is None:
        changes["head"] = head
    return replace(settings, **changes)
