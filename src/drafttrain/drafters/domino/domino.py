"""Domino: the block of DFlash, and a correction of each slot's logits by the tokens of the block before it.

A = blocks, K = draft tokens of a block, D = hidden, g = width of the recurrent state, e = rank of the correction
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.printable import shown
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash.config import section_sizes
from drafttrain.drafters.dflash.settings import OWN, BlockSettings
from drafttrain.drafters.dflash.walk import AddingWalk
from drafttrain.drafters.dflash.walked import AddingDrafter
from drafttrain.drafters.domino.prefix import PrefixGru, PrefixWalk, correction
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.warm_start import settings_fixed_by_checkpoint
from drafttrain.losses.ce import CrossEntropy

SIZES = ("gru_hidden_dim", "emb_dim")
PREFIX = "pure_draft_prefix_len"
FIELDS = (*SIZES, PREFIX)
"""Settings that fix the architecture; in config.json they are in `dflash_config`."""

PROJECTOR = "domino"
"""`dflash_config.projector_type` of this kind."""


@dataclass
class DominoSettings(BlockSettings):
    """A block in one pass, then a walk in which each token depends on all tokens of the block before it (Domino)."""

    anchors: int = setting(
        256, help="Roots drawn in each document in each step, without replacement; their blocks are trained.", ge=1
    )
    sample_from_anchor: bool = setting(
        True,
        help="Slot s predicts token s + 1 after the root, so the root's slot predicts too (published as shift_label); false: "
        "slot s predicts token s.",
    )
    gru_hidden_dim: int = setting(1024, help="Width of the recurrent state of the block's tokens.", ge=1)
    emb_dim: int = setting(256, help="Rank of the correction.", ge=1)
    pure_draft_prefix_len: int = setting(
        1, help="Draft tokens at the start of a block whose logits are not corrected.", ge=0
    )
    base_decay_ratio: float = setting(
        1.0,
        help="Share of all training steps over which the weight of the base logits' cross-entropy falls linearly from 1 to 0. "
        "The loss of the corrected logits has the rest of the weight.",
        gt=0,
        le=1,
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax. At 0 both are the same."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [*super().check(), *settings_fixed_by_checkpoint(self, FIELDS)]
        num_drafts = self.block_size - (not self.sample_from_anchor)
        if self.pure_draft_prefix_len >= num_drafts > 0:
            problems.append(
                f"{PREFIX}: must be less than the {num_drafts} draft tokens of a block, or none is corrected, "
                f"got {self.pure_draft_prefix_len}"
            )
        return problems


@drafters.register("domino", DominoSettings)
class Domino(AddingDrafter):
    """logits of slot k = head(h_k) + W_b SiLU(W_a [h_k ; s_k]), s_k a recurrent state of the block's tokens before.

    The loss of a step is (1 - c) loss(corrected logits) + c cross-entropy(base logits). c falls from 1 at the first step to 0, so
    training begins as that of DFlash. In validation and where the number of steps is not known, c is 0.

    Source: Domino, as in SpecForge (`DominoDraftModel`).
    """

    kind = "domino"
    settings_class = DominoSettings
    architecture = "DominoDraftModel"
    own_names = (*OWN, "base_decay_ratio")
    serving: ClassVar[str] = "SGLang has a class for it, which runs on GPUs only. It was not run by this project."

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__(config, parts)
        width, of_block = config["hidden_size"], config["dflash_config"]
        self.prefix_gru = PrefixGru(input_size=width, hidden_size=of_block["gru_hidden_dim"])
        self.embed_proj = correction(
            hidden_size=width,
            state_size=of_block["gru_hidden_dim"],
            rank=of_block["emb_dim"],
            num_tokens=config.get("draft_vocab_size") or config["vocab_size"],
        )

    @classmethod
    def block_fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return the fields of the correction."""
        own = {name: getattr(settings, name) for name in FIELDS}
        return {"projector_type": PROJECTOR, **own, "shift_label": settings.sample_from_anchor}

    @classmethod
    def problems_of(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the correction."""
        return field_problems(config)

    @property
    def walk(self) -> AddingWalk:
        """The recurrent state and the correction."""
        return PrefixWalk(self.prefix_gru, self.embed_proj, self._parts, self.config["dflash_config"][PREFIX])

    @property
    def step_modules(self) -> Sequence[nn.Module]:
        """The recurrent unit and the correction."""
        return [self.prefix_gru, self.embed_proj]

    def completed(self, made: DraftOutput, hidden_AKD: Tensor, embedded_AKe: Tensor, batch: DraftBatch) -> DraftOutput:
        """Return the output with the base logits trained beside the corrected ones."""
        share = self.base_share(batch)
        if not share:
            return made
        base, corrected = (
            {depth: part * weight for depth, weight in made.depth_weights.items()} for part in (share, 1 - share)
        )
        states = replace(made, states_BTD=self.by_depth(hidden_AKD, batch), head=self.base_head, depth_weights=base)
        return replace(made, depth_weights=corrected, beside=(Beside(states, CrossEntropy(), batch.target_rows),))

    def base_share(self, batch: DraftBatch) -> float:
        """Return the weight of the base logits' loss at the step of a batch: 1 at the first step, 0 at the end of the decay."""
        if not self.training or not batch.num_steps:
            return 0.0
        last = max(1.0, self.own["base_decay_ratio"] * batch.num_steps - 1)
        return max(0.0, 1 - batch.step / last)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the block and of the walk, and those of the base logits' loss."""
        yield from super().products(shape)
        blocks = shape.blocks(self.own["anchors"])
        slots = self.num_depths * blocks.roots
        yield matrix(self.prefix_gru.weight_ih_l0.numel(), slots, gradients=1)
        yield matrix(self.prefix_gru.weight_hh_l0.numel(), slots, gradients=2)
        yield matrix(parameters_of(self.embed_proj[0]), slots, gradients=2)
        for depth in range(1, self.num_depths + 1):
            yield matrix(self.head_parameters, blocks.rows(depth), gradients=1 if self.lm_head is None else 2)


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one line for every wrong field of the correction in config.json."""
    given = config.get("dflash_config")
    if not isinstance(given, Mapping):
        # The checks of the block's own fields name it.
        return []
    found = section_sizes(given, SIZES)
    if given.get("projector_type") != PROJECTOR:
        found.append(f"dflash_config.projector_type must be {PROJECTOR!r}, got {shown(given.get('projector_type'))}")
    first, size = bool(config.get("sample_from_anchor")), config.get("block_size")
    if given.get("shift_label") is not first:
        found.append(
            f"dflash_config.shift_label must be sample_from_anchor, {first}: both say whether the root's slot predicts, "
            f"got {shown(given.get('shift_label'))}"
        )
    length = given.get(PREFIX)
    last = size - 1 - (not first) if type(size) is int else None
    if type(length) is not int or length < 0 or (last is not None and length > last):
        found.append(f"dflash_config.{PREFIX} must be a whole number of 0..{last}, got {shown(length)}")
    return found


def head_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of the walk, by name, for the fields of config.json."""
    width, of_block = config["hidden_size"], config["dflash_config"]
    state, rank = of_block["gru_hidden_dim"], of_block["emb_dim"]
    return {
        "prefix_gru.weight_ih_l0": (3 * state, width),
        "prefix_gru.weight_hh_l0": (3 * state, state),
        "embed_proj.0.weight": (rank, width + state),
        "embed_proj.2.weight": (config.get("draft_vocab_size") or config["vocab_size"], rank),
    }
