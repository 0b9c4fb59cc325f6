"""Consistency training: the target itself is tuned so that Jacobi decoding of its text needs few iterations.

B = sequences, T = positions, N = rows, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.foreign import read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.consistency.trajectories import Trajectories
from drafttrain.drafters.jacobi import JacobiProposer
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import TunedTarget, TuningSettings, tuning_in
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import head_parameters


@dataclass
class ConsistencySettings:
    """The target tuned to solve blocks of its own text in few Jacobi iterations. It drafts for itself."""

    tune: TuningSettings = setting(TuningSettings(), help="How the target is tuned.")
    block: int = setting(16, help="Tokens of a block, whose Jacobi iterates are trained to jump to its end.", ge=2)
    text_weight: float = setting(
        10.0, help="Weight of the recipe's loss, on the texts as they are, beside the consistency loss.", gt=0
    )
    mixed_labels: float | None = setting(
        None,
        help="CEED-VLA: the label of a block is the target's own solution, or the text where the two differ in more than this share of "
        "the tokens. null: only blocks whose solution is the text are trained.",
        ge=0,
        le=1,
    )

    draft: ClassVar[str] = "greedy"


@drafters.register("consistency", ConsistencySettings)
class Consistency(Drafter):
    """The tuned target, which drafts for itself by Jacobi iterations. Lag 0: depth 1 is its own distribution.

    L = text_weight * (the recipe's loss) + E_j[-sum_v p(v | y*) log p(v | y^j)], the second term at the places of a block from the
    first difference of y^j and y* on; p(. | y*) has no gradient.

    Source: Kou et al. 2024, CLLMs, arXiv 2403.00835, 3.2 (global consistency).
    """

    kind = "consistency"
    lag = 0
    needs_target = True
    drafts_trees = False
    draft = "greedy"
    serving: ClassVar[str] = """\
TARGET must be the tuned one: the target with adapter/ of this folder (peft's format), or target/. Any engine serves it without
drafts. None of the engines here runs Jacobi iterations: `drafttrain eval DRAFTER --target TARGET` does, and for Llama targets the
authors' code, hao-ai-lab/Consistency_LLM."""

    def __init__(self, *, block: int, text_weight: float = 1.0) -> None:
        super().__init__()
        self.block = block
        self.text_weight = text_weight
        self.weights: Any = None
        """Those of `tuned`, in training."""

    @classmethod
    def create(cls, settings: ConsistencySettings, *, target: Target | None, tokenizer: Any) -> Consistency:
        """Return the target as it is, with weights to tune it."""
        if target is None:
            raise CheckpointError("drafter.kind is 'consistency' but target.model is null: the target itself is tuned")
        made = cls(block=settings.block, text_weight=settings.text_weight)
        made.tuned = TunedTarget(target, settings.tune.lora, key="drafter.tune.lora")
        made.weights = made.tuned.weights
        return made

    @classmethod
    def tuned_by(cls, settings: ConsistencySettings) -> str | None:
        """Return the key of the tuning."""
        return "tune"

    @classmethod
    def notes(cls, settings: ConsistencySettings) -> TextNotes | None:
        """Return the Jacobi trajectories of the texts."""
        return Trajectories(settings.block, settings.mixed_labels)

    @property
    def replayable(self) -> bool:
        """Its drafts depend on the rounds before."""
        return False

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the tuned target's states of the texts, with the consistency loss in training."""
        tuned = self._tuned
        final_BTD, _ = tuned.read(batch)
        drafted = DraftOutput({1: final_BTD}, tuned.head, self.lag)
        if not self.training:
            return drafted
        assert batch.altered is not None, "the run attaches the trajectories"
        altered_BTD, _ = tuned.read(replace(batch, tokens_BT=batch.altered.tokens_BT))
        return replace(
            drafted,
            depth_weights={1: self.text_weight},
            extra_loss=self._consistency(final_BTD, altered_BTD, batch.altered),
        )

    def _consistency(self, final_BTD: Tensor, altered_BTD: Tensor, altered: AlteredText) -> Tensor:
        """Return the weighted sum over the altered slots of the cross-entropy with the distribution after the label."""
        size = self._tuned.target.num_tokens

        def logits(states_BTD: Tensor) -> Tensor:
            return self._tuned.head(states_BTD.flatten(0, 1).index_select(0, altered.slots_N), 1)[:, :size].float()

        with torch.no_grad():
            label_NV = logits(final_BTD).softmax(dim=-1)
        found_NV = logits(altered_BTD).log_softmax(dim=-1)
        return -(altered.weights_N * (label_NV * found_NV).sum(dim=-1)).sum()

    @property
    def _tuned(self) -> TunedTarget:
        assert self.tuned is not None, "only a drafter in training has a forward"
        return self.tuned

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of two passes through the target, and of its head at the labels."""
        for _ in range(2):
            yield from self._tuned.products(shape)
        yield matrix(head_parameters(self._tuned.target.model), shape.rows(1), gradients=1)

    @property
    def device(self) -> torch.device:
        """Where its weights are; a loaded one has none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return Jacobi's proposer: its drafts are read off the verifying call."""
        return JacobiProposer()

    def save(self, folder: Path) -> None:
        """Write what the target was tuned to; model.safetensors is empty."""
        write_json(folder / "config.json", {"model_type": self.kind, "block": self.block})
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        self._tuned.save(folder)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Consistency:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The block is no number.
        """
        block = read_json(folder / "config.json").get("block")
        if type(block) is not int or block < 2:
            raise CheckpointError(f"{folder / 'config.json'}: block must be a number of at least 2, got {block!r:.60}")
        made = cls(block=block)
        made.tuning = tuning_in(folder)
        return made.eval()
