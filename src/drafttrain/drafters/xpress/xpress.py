"""XPress: the block of DFlash, and a causal head that corrects all its slots at once, several times.

A = blocks, K = draft tokens of a block, D = hidden, E = width of a packed state, r = rank, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.printable import shown
from drafttrain.core.settings import setting
from drafttrain.core.weights import Weights, weights_of
from drafttrain.distributed.collectives import shared
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash.proposer import BlockProposer
from drafttrain.drafters.dflash.settings import OWN, BlockSettings
from drafttrain.drafters.dflash.walked import AddingDrafter
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.warm_start import settings_fixed_by_checkpoint
from drafttrain.drafters.xpress.passes import Candidates, before, passes
from drafttrain.drafters.xpress.proposer import XPressProposer
from drafttrain.drafters.xpress.refiner import RefinerHead
from drafttrain.losses.pieces import PIECE_BYTES

BLOCK_SIZE = "xpress_block_size"
FIELDS = {
    "rank": "xpress_rank",
    "mlp_hidden": "xpress_mlp_hidden",
    "num_passes": "xpress_num_passes",
    "num_candidates": "xpress_topc",
}
"""Settings of the head, and their published names in config.json."""


@dataclass
class XPressSettings(BlockSettings):
    """A block in one pass, then passes of a causal head that read the tokens of the pass before (XPress)."""

    rank: int = setting(256, help="Rank of the correction.", ge=1)
    mlp_hidden: int = setting(512, help="Width of the head's feed-forward block.", ge=1)
    num_passes: int = setting(
        6,
        help="Passes of a round. After as many passes as draft tokens, the chain is that of drafting from left to right.",
        ge=1,
    )
    num_candidates: int = setting(
        0,
        help="Tokens of each slot, the likeliest before the correction, that are corrected in drafting; 0: all.",
        ge=0,
    )
    own_passes: int = setting(
        3, help="Passes on the drafter's own tokens that a step trains, beside one on the text's tokens.", ge=1
    )
    own_weight: float = setting(
        0.3,
        help="Weight of their mean loss; the pass on the text's tokens has 1. 0: train on the text's tokens alone.",
        ge=0,
    )
    base_weight: float = setting(0.6, help="Weight of the loss of the logits before any correction; 0: none.", ge=0)
    draft: Literal["greedy"] = setting(
        "greedy",
        help="At every temperature the chain is the argmax of each slot after the last pass, and its tokens are FIXED: the passes "
        "define no distribution of a token.",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [*super().check(), *settings_fixed_by_checkpoint(self, FIELDS)]
        if self.sample_from_anchor:
            problems.append("sample_from_anchor: must be false: the root's slot predicts nothing in XPress")
        if self.draft_vocab_size is not None:
            problems.append("draft_vocab_size: must be null: XPress drafts the target's whole vocabulary with its head")
        return problems


@drafters.register("xpress", XPressSettings)
class XPress(AddingDrafter):
    """logits of slot k = head(h_k) + w2 x_k, where x_k is made from all slots' states and the tokens before (`RefinerHead`).

    The loss of a step is that of the logits after the text's tokens, as of every walk; plus `own_weight` times the mean loss of
    the first `own_passes` passes on the drafter's own tokens, which are drafted without gradient as in decoding; plus
    `base_weight` times that of the base logits. Validation has the first alone: a slot matters where all drafts before it were
    accepted, so they are the text's.

    Source: Wang et al. 2026, xPress, arXiv 2608.02438. Training as in the authors' change to speculators, pull request 1061, but for
    the token before the root, where the root itself stands in as it does in vLLM.
    """

    kind = "xpress"
    settings_class = XPressSettings
    architecture = "Qwen3XPressModel"
    own_names = (*OWN, "own_passes", "own_weight", "base_weight")
    proposer_class: ClassVar[type[BlockProposer]] = XPressProposer
    serving: ClassVar[str] = (
        "vLLM's model runner V2 has a class for it from 0.33.0, which runs on GPUs only. It was not run by this project."
    )

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__(config, parts)
        self.xpress_head = refiner_of(config)

    @classmethod
    def fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return the fields of the head."""
        return {BLOCK_SIZE: settings.block_size} | {field: getattr(settings, name) for name, field in FIELDS.items()}

    @classmethod
    def problems_of(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the head."""
        return field_problems(config)

    @property
    def walk(self) -> RefinerHead:
        """The head."""
        return self.xpress_head

    @property
    def num_passes(self) -> int:
        """Passes of a round."""
        return int(self.config["xpress_num_passes"])

    @property
    def num_candidates(self) -> int:
        """Tokens of each slot that are corrected; 0: all."""
        return int(self.config["xpress_topc"])

    @property
    def step_modules(self) -> Sequence[nn.Module]:
        """The parts that every pass reads: those beyond w1, of which it reads rows, and the projections of states."""
        head = self.xpress_head
        return [head.in_proj, head.mix, head.mlp, head.w2]

    @property
    def num_steps(self) -> int:
        """Passes of a round: more than draft tokens change nothing, so they are not run."""
        return min(self.num_passes, self.num_depths)

    def predicting(self, states_ABD: Tensor) -> Tensor:
        """Return hidden_AKE of the slots that predict, packed: the head reads the states of all slots."""
        return self.xpress_head.packed(states_ABD)

    def head_states(self, hidden_AKE: Tensor) -> Tensor:
        """Return states_AKD, which the target's head reads."""
        return self.xpress_head.head_states(hidden_AKE)

    def completed(self, made: DraftOutput, hidden_AKE: Tensor, embedded_AKr: Tensor, batch: DraftBatch) -> DraftOutput:
        """Return the output with the losses of passes on the drafter's own tokens, and of the base logits, beside it."""
        if not self.training:
            return made
        own_AKD, root_Ar = self.head_states(hidden_AKE), embedded_AKr[:, 0]
        weight = self.own["own_weight"] / self.own["own_passes"]
        beside = []
        for tokens_AK in self.own_tokens(hidden_AKE, root_Ar) if weight else []:
            factors_AKr = self.xpress_head.factors(hidden_AKE, before(self.xpress_head, tokens_AK, root_Ar))
            factors_AKr = factors_AKr.to(own_AKD.dtype)
            beside.append(self._weighted(made, torch.cat([own_AKD, factors_AKr], dim=-1), batch, weight))
        if base_weight := self.own["base_weight"]:
            beside.append(self._weighted(replace(made, head=self.base_head), own_AKD, batch, base_weight))
        return replace(made, beside=tuple(beside))

    def own_tokens(self, hidden_AKE: Tensor, root_Ar: Tensor) -> list[Tensor]:
        """Return, for each trained pass, tokens_AK that it reads: the drafter's own after the pass before, without gradient."""
        tokens = [self._drafts(*part) for part in self._parts_of(hidden_AKE, root_Ar)]
        return [torch.cat(of_pass)[: len(root_Ar)] for of_pass in zip(*tokens, strict=True)]

    @torch.no_grad()
    def _drafts(self, hidden_AKE: Tensor, root_Ar: Tensor) -> list[Tensor]:
        """Return tokens_AK before the first pass, and after each but the last that is trained."""
        head, size = self.xpress_head, self._parts.num_tokens
        base_AKR = self.base_head(self.head_states(hidden_AKE), 1)[..., :size]
        candidates = Candidates(base_AKR, lambda factors_AKr: head.w2(factors_AKr)[..., :size])
        made = passes(head, candidates, hidden_AKE, root_Ar)
        return [tokens_AK for _, tokens_AK in islice(made, self.own["own_passes"])]

    def _parts_of(self, hidden_AKE: Tensor, root_Ar: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the blocks in parts whose logits exist at once."""
        count = max(1, PIECE_BYTES.on(hidden_AKE.device) // (4 * self.num_depths * self.xpress_head.w2.out_features))
        parts = list(zip(hidden_AKE.split(count), root_Ar.split(count), strict=True))
        if hasattr(self.xpress_head.w2.weight, "ds_id"):
            # ZeRO-3 gathers weights at every call: all ranks must make the same calls.
            (most,) = map(max, zip(*shared([len(parts)]), strict=True))
            parts += parts[-1:] * (most - len(parts))
        return parts

    def _weighted(self, made: DraftOutput, states_AKD: Tensor, batch: DraftBatch, weight: float) -> Beside:
        """Return states with the loss of the drafts, times a weight."""
        weights = {depth: weight * factor for depth, factor in made.depth_weights.items()}
        states = replace(made, states_BTD=self.by_depth(states_AKD, batch), depth_weights=weights)
        return Beside(states, None, batch.target_rows)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the block and of the pass on the text's tokens, those of the other passes, and of the base logits."""
        yield from super().products(shape)
        head, blocks, rank = self.xpress_head, shape.blocks(self.own["anchors"]), self.xpress_head.rank
        roots, slots = blocks.roots, blocks.roots * self.num_depths
        rows = sum(blocks.rows(depth) for depth in range(1, self.num_depths + 1))
        trained = self.own["own_passes"] if self.own["own_weight"] else 0
        with_base = trained + bool(self.own["base_weight"])
        yield matrix(parameters_of(head.down_h) + 2 * rank**2, roots * self.block_size, gradients=2)
        yield matrix(parameters_of(head.down_g, head.mix), roots, gradients=2)
        a_pass, mixed = rank**2 + parameters_of(head.mlp), rank * self.num_depths**2
        yield matrix(a_pass, slots * (1 + trained), gradients=2)
        yield matrix(mixed, roots * (1 + trained), gradients=2)
        yield matrix(self.head_parameters, rows * with_base, gradients=1)
        yield matrix(parameters_of(head.w2), rows * trained, gradients=2)
        if trained:
            yield matrix(self.head_parameters, slots, gradients=0)
            yield matrix(a_pass + parameters_of(head.w2), slots * (trained - 1), gradients=0)
            yield matrix(mixed, roots * (trained - 1), gradients=0)

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the context, a block, the head and the passes), and the bytes of one embedding row.

        A pass reads all of w2, also where only candidates are corrected.
        """
        of_context, of_block, of_head, row = super().decoding_weights()
        return of_context, of_block + weights_of(self.xpress_head.down_h, self.xpress_head.down_g), of_head, row


def refiner_of(config: Mapping[str, Any]) -> RefinerHead:
    """Return the new head of a configuration."""
    return RefinerHead(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        block_size=config["block_size"],
        rank=config["xpress_rank"],
        mlp_hidden=config["xpress_mlp_hidden"],
    )


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one line for every wrong field of the head in config.json."""
    limits = {
        "xpress_rank": (1, 65536),
        "xpress_mlp_hidden": (1, 65536),
        "xpress_num_passes": (1, 4096),
        "xpress_topc": (0, 1 << 24),
    }
    found = [
        f"{key} must be a whole number of {low}..{high}, got {shown(config.get(key))}"
        for key, (low, high) in limits.items()
        if type(config.get(key)) is not int or not low <= config[key] <= high
    ]
    if config.get(BLOCK_SIZE) != config.get("block_size"):
        found.append(
            f"{BLOCK_SIZE} must be block_size, {shown(config.get('block_size'))}, got {shown(config.get(BLOCK_SIZE))}"
        )
    if config.get("sample_from_anchor"):
        found.append("sample_from_anchor must be false: the root's slot predicts nothing in XPress")
    if config.get("draft_vocab_size") is not None:
        found.append(
            f"draft_vocab_size must be null: XPress has the target's vocabulary, got {shown(config['draft_vocab_size'])}"
        )
    return found


def head_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the head's tensors, by name, for the fields of config.json."""
    with torch.device("meta"):
        head = nn.ModuleDict({"xpress_head": refiner_of(config)})
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
