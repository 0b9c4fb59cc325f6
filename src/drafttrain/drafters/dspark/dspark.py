"""DSpark: the block of DFlash, a Markov head that joins its tokens, and a head that predicts which of them are accepted.

A = blocks, K = draft tokens of a block, D = hidden, e = rank
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.printable import shown
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash.settings import BlockSettings
from drafttrain.drafters.dflash.walk import AddingWalk
from drafttrain.drafters.dflash.walked import AddingDrafter
from drafttrain.drafters.dspark.calibration import FILE, calibrated_temperatures, predictions, read_temperatures
from drafttrain.drafters.dspark.markov import MARKOV_HEADS, ConfidenceHead
from drafttrain.drafters.dspark.proposer import DSparkProposer
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.warm_start import settings_fixed_by_checkpoint
from drafttrain.target_model import Target

FIELDS = {
    "markov_rank": "markov_rank",
    "markov_head": "markov_head_type",
    "confidence_head": "enable_confidence_head",
    "confidence_with_markov": "confidence_head_with_markov",
}
"""Settings that fix the architecture, and their names in config.json, which are DeepSpec's."""


@dataclass
class DSparkSettings(BlockSettings):
    """A block in one pass, then a walk in which each token depends on the one before it (DSpark)."""

    block_size: int = setting(
        7, help="Slots of a block: the root and its mask tokens. Inference uses the same number.", ge=1
    )
    gamma: float = setting(4.0, help="The loss of depth d has weight exp(-(d - 1) / gamma).", gt=0)
    sample_from_anchor: bool = setting(
        True,
        help="Slot s predicts token s + 1 after the root, so the root's slot predicts too; false: slot s predicts token s.",
    )
    markov_rank: int = setting(256, help="Rank of the bias by the token before.", ge=1)
    markov_head: Literal["vanilla", "gated", "rnn"] = setting(
        "vanilla",
        help="vanilla: the bias depends on the token before; gated: each slot weighs it; rnn: it depends on all tokens of the "
        "block before. vLLM loads vanilla only.",
    )
    confidence_head: bool = setting(
        True, help="Predict the chance that each draft token is accepted. Train it with the loss `confidence`."
    )
    confidence_with_markov: bool = setting(True, help="The prediction reads the token before, too.")
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax. At 0 both are the same."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return [*super().check(), *settings_fixed_by_checkpoint(self, FIELDS)]


@drafters.register("dspark", DSparkSettings)
class DSpark(AddingDrafter):
    """logits of slot s = head(h_s) + W2 f_s, where f_s is made from the token before the one that slot s predicts.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """

    kind = "dspark"
    settings_class = DSparkSettings
    architecture = "Qwen3DSparkModel"
    proposer_class = DSparkProposer
    serving: ClassVar[str] = (
        "vLLM's model runner V2 has a class for it (vanilla Markov head), which runs on GPUs only. It was not run by this project."
    )

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__(config, parts)
        width, rank = config["hidden_size"], config["markov_rank"]
        self.markov_head = MARKOV_HEADS[config["markov_head_type"]](
            vocab_size=config["vocab_size"],
            draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
            hidden_size=width,
            rank=rank,
        )
        self.temperatures = [1.0] * self.num_depths
        """By slot, what a predicted logit is divided by in decoding."""
        self.confidence_head: ConfidenceHead | None = None
        if config["enable_confidence_head"]:
            self.confidence_head = ConfidenceHead(
                hidden_size=width, rank=rank if config["confidence_head_with_markov"] else 0
            )

    @classmethod
    def fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return the fields of the heads."""
        return {field: getattr(settings, name) for name, field in FIELDS.items()}

    @classmethod
    def predicts_confidence(cls, settings: Any) -> bool:
        """Return whether it has a confidence head."""
        return bool(settings.confidence_head)

    @classmethod
    def problems_of(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the heads."""
        found = []
        rank, head = config.get("markov_rank"), config.get("markov_head_type")
        if type(rank) is not int or not 1 <= rank <= 65536:
            found.append(f"markov_rank must be a whole number of 1..65536, got {shown(rank)}")
        if head not in MARKOV_HEADS:
            found.append(f"markov_head_type must be one of {', '.join(MARKOV_HEADS)}, got {shown(head)}")
        return found + [
            f"{name} must be true or false, got {shown(config.get(name))}"
            for name in ("enable_confidence_head", "confidence_head_with_markov")
            if type(config.get(name)) is not bool
        ]

    @property
    def walk(self) -> AddingWalk:
        """The Markov head."""
        return self.markov_head

    @property
    def step_modules(self) -> Sequence[nn.Module]:
        """The parts of the heads but W1, of which a step reads a row."""
        step = [part for name, part in self.markov_head.named_children() if name != "markov_w1"]
        return step if self.confidence_head is None else [*step, self.confidence_head]

    def completed(self, made: DraftOutput, hidden_AKD: Tensor, embedded_AKe: Tensor, batch: DraftBatch) -> DraftOutput:
        """Return the output with the predicted acceptance."""
        if self.confidence_head is None:
            return made
        return replace(made, confidence_BT=self.by_depth(self.confidence_head(hidden_AKD, embedded_AKe), batch))

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the block, and of the heads on it."""
        yield from super().products(shape)
        inner = sum(parameters_of(part) for name, part in self.markov_head.named_children() if name.endswith("proj"))
        inner += 0 if self.confidence_head is None else parameters_of(self.confidence_head)
        yield matrix(inner, self.num_depths * shape.blocks(self.own["anchors"]).roots, gradients=2)

    def calibrate(self, target: Target, batches: Iterable[DraftBatch]) -> Mapping[str, Any]:
        """Return the file of the temperatures of the predictions."""
        if self.confidence_head is None:
            return {}
        self.eval()
        return {FILE: {"temperatures": calibrated_temperatures(*predictions(self, target, batches))}}

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Self:
        """Read the folder that `save` wrote, and the calibrated temperatures if it has any."""
        drafter = super().load(folder, target, dtype)
        drafter.temperatures = read_temperatures(folder, count=drafter.num_depths)
        return drafter
