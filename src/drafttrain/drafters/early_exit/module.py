"""Early exit, trained: the target is tuned so that its final norm and head can read the states between its blocks (LayerSkip).

B = sequences, T = positions, D = hidden, L = blocks
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput, Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_text
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.foreign import one_of, read_json
from drafttrain.core.linear_head import no_autocast_if_frozen
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.drafter import DRAFTS
from drafttrain.drafters.early_exit.curriculum import CurriculumSettings
from drafttrain.drafters.early_exit.layer_dropout import dropped_blocks
from drafttrain.drafters.early_exit.proposer import EarlyExitProposer
from drafttrain.drafters.tuned_target import TunedTarget, TuningSettings, tuned, tuning_in
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.documents import document_states, probe
from drafttrain.target_model.logits import head_of
from drafttrain.target_model.matrix_products import head_parameters


@dataclass
class EarlyExitSettings(CurriculumSettings):
    """The target's first blocks draft; the target is tuned for that."""

    exit_layer: int = setting(2, help="Target blocks that draft: from 1 to one less than the target has.", ge=1)
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax (then nodes are FIXED)."
    )
    tune: TuningSettings = setting(TuningSettings(), help="How the target is tuned.")


@drafters.register("early_exit", EarlyExitSettings)
class EarlyExitDrafter(Drafter):
    """One head and one norm for all exits; a step trains some of them, and the target's end, with the recipe's loss.

    Lag 0. It starts as the early exit of the target as it is. All of its weights are the target's: it serves the tuned target,
    and parity is with that one.

    Source: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710.
    """

    kind = "early_exit"
    drafts_trees = False
    why_alone = "runs the target's first blocks on its own nodes only"
    lag = 0
    needs_target = True
    serving = """\
transformers drafts so: the tuned target's `generate(..., assistant_early_exit=EXIT)`, where EXIT is `exit_layer` of config.json. The
tuned target is the folder target/, or TARGET with the adapters of the folder adapter/. No other serving engine exits early; these
figures are from the embedded evaluator.

    drafttrain eval DRAFTER --target TARGET"""

    def __init__(self, target: Target, settings: EarlyExitSettings) -> None:
        super().__init__()
        self.num_blocks = len(blocks(target.model))
        if not 1 <= settings.exit_layer < self.num_blocks:
            raise CheckpointError(
                f"exit_layer must be 1..{self.num_blocks - 1} for this target ({self.num_blocks} blocks), got {settings.exit_layer}"
            )
        self.settings = settings
        self.exit_layer = settings.exit_layer
        self.draft = settings.draft
        self._target = target
        """The tuned one, of a drafter that was loaded."""

    @classmethod
    def create(cls, settings: EarlyExitSettings, *, target: Target | None, tokenizer: Any) -> EarlyExitDrafter:
        """Return the early exit of the target as it is, with the weights that tune it."""
        if target is None:
            raise CheckpointError("drafter.kind is 'early_exit' but target.model is null: its blocks are the target's")
        made = cls(target, settings)
        made.tuned = TunedTarget(target, settings.tune.lora, key="drafter.tune.lora")
        made.weights = made.tuned.weights
        return made

    @classmethod
    def tuned_by(cls, settings: EarlyExitSettings) -> str | None:
        """Return the key of the tuning."""
        return "tune"

    @property
    def device(self) -> torch.device:
        """That of the target."""
        return self._target.device

    @property
    def _reads_itself(self) -> bool:
        """Its forward runs the target in training; else it reads the states of a target that is tuned already."""
        return self.tuned is not None and not self.tuned.weights.on

    def needs(self) -> TargetNeeds:
        """Return the state that enters the exit layer, of a target that is tuned already."""
        return TargetNeeds() if self._reads_itself else TargetNeeds(hidden=(self.exit_layer,))

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of the exit that drafts, and beside them those of the others that this step trains."""
        if not self._reads_itself:
            assert batch.target is not None, "the module reads the target first"
            normed_BTD: Tensor = final_norm(self._target.model)(batch.target.hidden_BTD[self.exit_layer])
            return DraftOutput({1: normed_BTD}, self._head, self.lag)
        moment: dict[str, int] = {"step": batch.step, "num_steps": batch.num_steps}
        trained = self.settings.trained(self.num_blocks, **moment) if self.training else []
        states_BTD = self._states(batch, sorted({*trained, self.exit_layer}))
        weights = self.settings.weights(trained, self.num_blocks) if trained else {self.exit_layer: 1.0}
        drafted = {one: self._drafted(states, weights.get(one, 0.0)) for one, states in states_BTD.items()}
        others = [one for one, weight in weights.items() if weight and one != self.exit_layer]
        beside = tuple(Beside(drafted[one], None, batch.target_rows) for one in others)
        return replace(drafted[self.exit_layer], beside=beside)

    def _drafted(self, states_BTD: Tensor, weight: float) -> DraftOutput:
        return DraftOutput({1: states_BTD}, self._head, self.lag, depth_weights={1: weight})

    def _states(self, batch: DraftBatch, exits: list[int]) -> Mapping[int, Tensor]:
        """Return the states of exits after the norm, of the target in training; gradients reach its weights."""
        assert self.tuned is not None
        model = self._target.model
        probe(model)  # it runs the model, which must not drop blocks then
        moment: dict[str, int] = {"step": batch.step, "num_steps": batch.num_steps}
        rates = self.settings.drop_rates(self.num_blocks, **moment) if self.training else []
        inner = tuple(one for one in exits if one < self.num_blocks)
        norm = final_norm(model)
        with (
            self.tuned.on(batch),
            dropped_blocks(model, batch, rates),
            no_autocast_if_frozen(model.get_output_embeddings().weight),
        ):
            final_BTD, hidden_BTD = document_states(
                model, batch.tokens_BT, batch.positions_BT, hidden=inner, documents=batch.packed_documents
            )
            states_BTD = {one: norm(hidden_BTD[one]) for one in inner}
        return states_BTD | ({self.num_blocks: final_BTD} if self.num_blocks in exits else {})

    @property
    def _head(self) -> Head:
        return head_of(self._target.model) if self.tuned is None else self.tuned.head

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the target's blocks in training, and of its head for each exit that a step trains, in the mean."""
        if self.tuned is None:
            return
        yield from self.tuned.products(shape)
        steps = range(self.settings.rotation)
        exits = sum(len(self.settings.trained(self.num_blocks, step=step, num_steps=0)) for step in steps) / len(steps)
        gradients = 2 if self.settings.tune.lora is None else 1
        yield matrix(round(exits * head_parameters(self._target.model)), shape.rows(1), gradients=gradients)

    def adapted(self, target: Target) -> Target:
        """Return the tuned target."""
        return target if self.tuning is None else self._target

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer, which uses the target's own cache."""
        return EarlyExitProposer(target, exit_layer=self.exit_layer, draft=self.draft, listener=listener)

    def save(self, folder: Path) -> None:
        """Write the number of the exit, and what the target was tuned to; model.safetensors is empty."""
        config = {
            "model_type": self.kind,
            "exit_layer": self.exit_layer,
            "num_hidden_layers": self.num_blocks,
            "draft": self.draft,
        }
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        if self.tuned is not None:
            self.tuned.save(folder)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> EarlyExitDrafter:
        """Read the exit, and the tuned target.

        Raises:
            CheckpointError: The files are damaged, or made for another target.
        """
        path = folder / "config.json"
        config, num_blocks = read_json(path), len(blocks(target.model))
        if config.get("num_hidden_layers") != num_blocks:
            raise CheckpointError(
                f"{path}: made for a target of {config.get('num_hidden_layers')!r:.60} blocks, {target.name} has {num_blocks}"
            )
        exit_layer = config.get("exit_layer")
        if not (type(exit_layer) is int and 1 <= exit_layer < num_blocks):
            raise CheckpointError(f"{path}: exit_layer must be 1..{num_blocks - 1}, got {exit_layer!r:.60}")
        tuning = tuning_in(folder)
        settings = EarlyExitSettings(exit_layer=exit_layer, draft=one_of(config, "draft", DRAFTS, path=path))
        made = cls(tuned(target, tuning), settings)
        made.tuning = tuning
        return made.eval()
