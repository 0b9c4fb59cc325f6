"""Consistency training: the target itself is tuned so that Jacobi decoding of its text needs few iterations.

B = sequences, T = positions, N = slots, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.consistency.trajectories import Trajectories
from drafttrain.drafters.drafts_itself import DraftsItself, DraftsItselfSettings
from drafttrain.drafters.jacobi import JacobiProposer
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import tuning_in
from drafttrain.target_model import Target


@dataclass(kw_only=True)
class ConsistencySettings(DraftsItselfSettings):
    """The target tuned to solve blocks of its own text in few Jacobi iterations. It drafts for itself."""

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
class Consistency(DraftsItself):
    """The tuned target, which drafts for itself by Jacobi iterations.

    L = text_weight * (the recipe's loss) + E_j[-sum_v p(v | y*) log p(v | y^j)], the second term at the places of a block from the
    first difference of y^j and y* on; p(. | y*) has no gradient.

    Source: Kou et al. 2024, CLLMs, arXiv 2403.00835, 3.2 (global consistency).
    """

    kind = "consistency"
    draft = "greedy"
    serving: ClassVar[str] = """\
TARGET must be the tuned one: the target with adapter/ of this folder (peft's format), or target/. Any engine serves it without
drafts. None of the engines here runs Jacobi iterations: `drafttrain eval DRAFTER --target TARGET` does, and for Llama targets the
authors' code, hao-ai-lab/Consistency_LLM."""

    def __init__(self, *, block: int, text_weight: float = 1.0) -> None:
        super().__init__()
        self.block = block
        self.text_weight = text_weight

    @classmethod
    def create(cls, settings: ConsistencySettings, *, target: Target | None, tokenizer: Any) -> Consistency:
        """Return the target as it is, with weights to tune it."""
        made = cls(block=settings.block, text_weight=settings.text_weight)
        made.tune(target, settings)
        return made

    @classmethod
    def notes(cls, settings: ConsistencySettings) -> TextNotes | None:
        """Return the Jacobi trajectories of the texts."""
        return Trajectories(settings.block, settings.mixed_labels)

    def loss_of_altered(
        self, final_BTD: Tensor, altered_BTD: Tensor, tokens_BT: Tensor, altered: AlteredText
    ) -> Tensor:
        """Return the cross-entropy with the distribution that the text as it is gives."""
        with torch.no_grad():
            label_NV = self.logits_at(final_BTD, altered.slots_N).softmax(dim=-1)
        found_NV = self.logits_at(altered_BTD, altered.slots_N).log_softmax(dim=-1)
        return -(altered.weights_N * (label_NV * found_NV).sum(dim=-1)).sum()

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return Jacobi's proposer: its drafts are read off the verifying call."""
        return JacobiProposer()

    def numbers(self) -> Mapping[str, int | str]:
        """Return the length of a block."""
        return {"block": self.block}

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
