"""DFlash2: the block of DFlash whose slots read their left neighbours, and a selector among each slot's best tokens.

A = blocks, K = draft tokens of a block, N = rows, D = hidden, R = rank, W = width of the drafter's head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput, Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.settings import setting
from drafttrain.core.weights import Weights
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash.config import section_sizes
from drafttrain.drafters.dflash.layer import BlockLayer
from drafttrain.drafters.dflash.settings import OWN, BlockSettings
from drafttrain.drafters.dflash.walk import Correction, Walk
from drafttrain.drafters.dflash.walked import WalkedDrafter
from drafttrain.drafters.dflash2.convolution import ConvolvedLayer, DynamicConvolution
from drafttrain.drafters.dflash2.selector import RECALL, CandidateCrossEntropy, CandidateSelector
from drafttrain.drafters.eagle.layer_config import llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.warm_start import settings_fixed_by_checkpoint

FIELDS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
"""Settings that fix the architecture; in config.json they are in `dflash_config`."""


@dataclass
class DFlash2Settings(BlockSettings):
    """A block in one pass whose slots read their left neighbours, then a walk over each slot's best tokens (DFlash2)."""

    anchors: int = setting(
        256, help="Roots drawn in each document in each step, without replacement; their blocks are trained.", ge=1
    )
    conv_kernel_size: int = setting(
        2, help="Taps of the convolutions: a slot reads itself and the slots before it, this many together.", ge=1
    )
    conv_group_size: int = setting(
        16, help="Channels that share the part of a kernel that depends on the slot; a divisor of the width.", ge=1
    )
    selector_rank: int = setting(256, help="Rank of the score of a candidate and the token before it.", ge=1)
    selector_top_k: int = setting(
        16, help="Candidates of a slot: the tokens with its largest logits. No other token is drafted.", ge=1
    )
    selector_loss_weight: float = setting(
        1.0, help="Weight of the selector's cross-entropy beside the loss of the slots' own logits.", gt=0
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax. At 0 both are the same."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [*super().check(), *settings_fixed_by_checkpoint(self, FIELDS)]
        if self.conv_kernel_size > self.block_size:
            problems.append(
                f"conv_kernel_size: at most the {self.block_size} slots of a block, got {self.conv_kernel_size}"
            )
        return problems


@drafters.register("dflash2", DFlash2Settings)
class DFlash2(WalkedDrafter):
    """Each slot's candidates are the tokens with its largest logits U; the next token is drawn from softmax(S) over them.

    The recipe's loss is that of U, over the whole vocabulary. Beside it the selector is trained: the cross-entropy of S over the
    candidates after the text's token, for the rows whose label is a candidate. In evaluation the logits are S, -inf elsewhere.

    Source: DFlash 2, as in NeMo Automodel (`Qwen3DFlash2DraftModel`) and vLLM (`DFlash2DraftModel`).
    """

    kind = "dflash2"
    settings_class = DFlash2Settings
    architecture = "DFlash2DraftModel"
    own_names = (*OWN, "selector_loss_weight")
    figures: ClassVar[tuple[str, ...]] = (RECALL,)
    serving: ClassVar[str] = (
        "vLLM has a class for it, which runs on GPUs only: `drafttrain export DRAFTER --to zlab`. It was not run by this project."
    )

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        width, of_block = config["hidden_size"], config["dflash_config"]
        if width % of_block["conv_group_size"]:
            raise CheckpointError(
                f"drafter.conv_group_size: must divide the target's width {width}, got {of_block['conv_group_size']}"
            )
        super().__init__(config, parts)
        self.candidate_selector = _new_selector(config)

    @classmethod
    def block_fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return the fields of the convolutions and of the selector."""
        return {name: getattr(settings, name) for name in FIELDS}

    @classmethod
    def problems_of(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of the convolutions and of the selector."""
        return field_problems(config)

    def new_layer(self, sizes: Any) -> BlockLayer:
        """Return an untrained layer with its convolutions."""
        return _new_layer(self.config, sizes)

    @property
    def walk(self) -> Walk:
        """The selector."""
        return self.candidate_selector

    @property
    def step_modules(self) -> Sequence[nn.Module]:
        """The selector without its codebooks, of which a step reads some rows."""
        return [self.candidate_selector.hidden_projection]

    def correction(self) -> Correction:
        """Return the scores of the candidates, which read their rows of the codebook only."""
        # An own vocabulary has no padding.
        num_tokens = self._parts.num_tokens if self.vocabulary is None else len(self.vocabulary)
        return partial(self.candidate_selector, num_tokens=num_tokens)

    @property
    def head(self) -> Head:
        """The head of what is drafted, for states [h ; f]."""
        base, correction, width = self.base_head, self.correction(), self.config["hidden_size"]

        def logits(states_ND: Tensor, depth: int) -> Tensor:
            own_ND, factor_NR = states_ND.tensor_split([width], dim=-1)
            return correction(base(own_ND, depth), factor_NR)

        return logits

    def completed(self, made: DraftOutput, hidden_AKD: Tensor, embedded_AKe: Tensor, batch: DraftBatch) -> DraftOutput:
        """Return, in training, the slots' own logits for the loss, with the selector trained beside them."""
        if not self.training:
            return made
        weight = self.own["selector_loss_weight"]
        weights = {depth: weight * of_depth for depth, of_depth in made.depth_weights.items()}
        selected = Beside(replace(made, depth_weights=weights), CandidateCrossEntropy(), None)
        return replace(made, states_BTD=self.by_depth(hidden_AKD, batch), head=self.base_head, beside=(selected,))

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the block and of the slots' own loss, and those of the selector's loss."""
        yield from super().products(shape)
        selector, blocks = self.candidate_selector, shape.blocks(self.own["anchors"])
        yield matrix(parameters_of(selector.hidden_projection), self.num_depths * blocks.roots, gradients=2)
        for depth in range(1, self.num_depths + 1):
            yield matrix(self.head_parameters, blocks.rows(depth), gradients=1 if self.lm_head is None else 2)
            yield matrix(selector.top_k * selector.successor_codebook.shape[1], blocks.rows(depth), gradients=2)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the layers except for their attention, and the convolutions."""
        super().compile_with(compiled)
        for part in self.layers.modules():
            if isinstance(part, DynamicConvolution):
                part.__dict__["convolved"] = compiled(part.convolved)

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the context, a block, the head and the walk), and the bytes of one embedding row."""
        of_context, of_block, of_head, row = super().decoding_weights()
        codebook = self.candidate_selector.successor_codebook
        rows = self.num_depths * (self.candidate_selector.top_k + 1)
        read = Weights(
            rows * codebook.shape[1] * codebook.element_size(), self.candidate_selector.top_k * codebook.shape[1]
        )
        return of_context, of_block, of_head + read, row


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one line for every wrong field of the convolutions and of the selector in config.json."""
    given = config.get("dflash_config")
    if not isinstance(given, Mapping):
        # The checks of the block's own fields name it.
        return []
    found = section_sizes(given, FIELDS)
    if found:
        return found
    taps, group = given["conv_kernel_size"], given["conv_group_size"]
    width, size = config.get("hidden_size"), config.get("block_size")
    if type(size) is int and taps > size:
        found.append(f"dflash_config.conv_kernel_size must be at most block_size, {size}, got {taps}")
    if type(width) is int and width % group:
        found.append(f"dflash_config.conv_group_size must divide hidden_size, {width}, got {group}")
    return found


def further_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that DFlash does not have, by name, for the fields of config.json."""
    with torch.device("meta"):
        layer, selector = _new_layer(config, llama_config(dict(config))), _new_selector(config)
    found = {f"candidate_selector.{name}": tensor for name, tensor in selector.state_dict().items()}
    for number in range(config["num_hidden_layers"]):
        of_layer = layer.state_dict().items()
        found |= {f"layers.{number}.{name}": tensor for name, tensor in of_layer if "_conv." in name}
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _new_layer(config: Mapping[str, Any], sizes: Any) -> ConvolvedLayer:
    of_block = config["dflash_config"]
    return ConvolvedLayer(sizes, taps=of_block["conv_kernel_size"], group_size=of_block["conv_group_size"])


def _new_selector(config: Mapping[str, Any]) -> CandidateSelector:
    of_block = config["dflash_config"]
    return CandidateSelector(
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        hidden_size=config["hidden_size"],
        rank=of_block["selector_rank"],
        top_k=of_block["selector_top_k"],
    )
