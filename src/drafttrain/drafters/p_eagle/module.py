"""P-EAGLE in training: real rows through all layers, then the mask slots that the step keeps.

B = sequences, T = positions, N = slots of all rows of a batch, one after another, M = mask slots, n = rows of a depth, D = hidden,
F = width of the target features, R = the drafter's vocabulary, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput, PackedDocuments
from drafttrain.core.few_sizes import is_compiled_by_size
from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters import drafters
from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, fusion_config
from drafttrain.drafters.eagle.layer import EagleLayer, compute_dtype
from drafttrain.drafters.eagle.layer_config import llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.mask_token import mask_token_of
from drafttrain.drafters.p_eagle.proposer import PEagleProposer
from drafttrain.drafters.p_eagle.settings import OWN, OWN_EMBEDDING, PEagleSettings, field_problems
from drafttrain.drafters.p_eagle.slots import MaskSlots
from drafttrain.drafters.p_eagle.stack import DeepLayer, Entered, mask_slots, real_rows, run_layer
from drafttrain.losses.align import chosen_rows
from drafttrain.losses.row_choice import DroppedDepths
from drafttrain.target_model import Target

ROWS_AT_ONCE = 1024
"""Rows whose mask slots are computed at once without gradients: validation reads all depths of every row."""

KeysAndValues = tuple[Tensor, Tensor]
"""(keys_1GNd, values_1GNd) of the real rows of a layer."""


@drafters.register("p_eagle", PEagleSettings)
class PEagleDrafter(Eagle3Drafter):
    """Row t of depth d predicts token t + d + 1 (lag 1), from features up to token t and tokens up to t + 1 alone.

    Depth 1 is EAGLE-3's first step, in several layers. The slot of depth d > 1 reads the mask token's embedding and `mask_hidden`,
    which passes through the same fusion as features do, at position t + d - 1. It attends to the real rows up to t and to the
    slots of row t up to itself.

    Source: P-EAGLE, in vLLM's speculators (0.9).
    """

    kind = "p_eagle"
    own_names: ClassVar[tuple[str, ...]] = OWN
    settings_class = PEagleSettings
    reads_slots: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__(config, parts)
        sizes = llama_config(config)
        # Named as engines name them; the first layer is `midlayer`.
        self.layers = nn.ModuleDict({str(i): DeepLayer(sizes) for i in range(1, config["num_hidden_layers"])})
        own = config.get(OWN_EMBEDDING)
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"]) if own else None
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features), requires_grad=self.num_depths > 1)
        self.mask_token_id: int = config["mask_token_id"]

    @classmethod
    def new_config(cls, settings: PEagleSettings, target: Target) -> dict[str, Any]:
        """Return the fields of config.json of a new drafter, which engines read."""
        return {
            **fusion_config(settings, target),
            "norm_output": False,
            "num_hidden_layers": settings.num_layers,
            "mask_token_id": mask_token_of(target, settings.mask_token_id),
            OWN_EMBEDDING: settings.train_embedding,
        }

    def start_weights(self) -> None:
        """Copy the target's head, its final norm and, for an own embedding, its embedding."""
        super().start_weights()
        if self.embed_tokens is not None:
            weight_VD = self.embed_tokens.weight
            every_1V = torch.arange(len(weight_VD), device=weight_VD.device)[None]
            weight_VD.data.copy_(super().embed(every_1V)[0])

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return embedded_BTD."""
        if self.embed_tokens is None:
            return super().embed(tokens_BT)
        embedded_BTD: Tensor = self.embed_tokens(tokens_BT)
        return embedded_BTD.to(compute_dtype(self.fc.weight))

    @classmethod
    def field_problems(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for a wrong number of layers, or a wrong mask token."""
        return field_problems(config)

    @property
    def num_depths(self) -> int:
        """Draft tokens of one pass."""
        return int(self.own["num_depths"])

    @property
    def deepest(self) -> int:
        """The depths that it was trained for."""
        return self.num_depths

    @property
    def each_layer(self) -> list[EagleLayer]:
        """The layers, in order."""
        return [self.midlayer, *self.deep_layers]

    @property
    def deep_layers(self) -> list[DeepLayer]:
        """The layers after the first."""
        return cast("list[DeepLayer]", list(self.layers.values()))

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of depth 1, and fewer of each further depth."""
        choice = DroppedDepths(self.own["depth_ratio"], self.own["depth_least"])
        return [RowsAsked(tuple(range(1, self.num_depths + 1)), self.lag, choice=choice)]

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth: in training at the rows that the step keeps, else at all of them."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        documents = batch.packed_documents or PackedDocuments.of(batch.positions_BT)
        real_ND, context = self._real_rows(batch, documents)
        states = self._kept if self.training else self._every
        asked = self.rows_asked()[0]
        return DraftOutput(
            states(batch, documents, real_ND, context),
            self._head,
            self.lag,
            vocabulary=self.vocabulary,
            choice=asked.choice if self.training else None,
        )

    def _kept(
        self, batch: DraftBatch, documents: PackedDocuments, real_ND: Tensor, context: Sequence[KeysAndValues]
    ) -> dict[int, Tensor]:
        """Return states_1nD of the rows that each depth keeps."""
        (first_n, _), *further = chosen_rows(batch, self.rows_asked()[0]).values()
        states = {1: _rows(real_ND, first_n)}
        if further:
            few = is_compiled_by_size(self.fc.weight.device, compute_dtype(self.fc.weight))
            slots = MaskSlots.of(dict(enumerate(further, start=2)), documents, few=few)
            masks_MD = self._mask_slots(batch, slots, context)
            states |= {depth: _rows(masks_MD, place_n) for depth, place_n in slots.of_depth.items()}
        return states

    def _every(
        self, batch: DraftBatch, documents: PackedDocuments, real_ND: Tensor, context: Sequence[KeysAndValues]
    ) -> dict[int, Tensor]:
        """Return states_BTD of all slots."""
        depths, count = min(batch.num_depths or self.num_depths, self.num_depths), len(real_ND)
        states = {1: real_ND}
        if depths > 1:
            edges = [0, count] if torch.is_grad_enabled() else [*range(0, count, ROWS_AT_ONCE), count]
            parts = [
                MaskSlots.every(first, last, documents, num_depths=depths, device=real_ND.device)
                for first, last in pairwise(edges)
            ]
            masks_MD = torch.cat([self._mask_slots(batch, slots, context) for slots in parts])
            states |= dict(enumerate(masks_MD.unflatten(0, (count, -1)).unbind(1), start=2))
        return {depth: state_ND.unflatten(0, batch.tokens_BT.shape) for depth, state_ND in states.items()}

    def _real_rows(self, batch: DraftBatch, documents: PackedDocuments) -> tuple[Tensor, list[KeysAndValues]]:
        """Return (stream_ND after the last layer, keys and values by layer)."""
        assert batch.target is not None
        features_1NF = self.features(batch.target).flatten(0, 1)[None]
        # No trained row reads beyond its document's end.
        ahead_1N, positions_1N = batch.tokens_BT.flatten().roll(-1)[None], batch.positions_BT.flatten()[None]
        entered = self.entering(self.embed_at(ahead_1N, positions_1N), self.fused(features_1NF))
        attend = real_rows(documents)
        context: list[KeysAndValues] = []
        for layer, following in zip_longest(self.each_layer, self.deep_layers):
            stream_1ND, *states = run_layer(layer, entered, positions_1N, attend, recompute=self.recomputing)
            context.append((states[0], states[1]))
            if following is not None:
                entered = following.entering(stream_1ND)
        return stream_1ND[0], context

    def _mask_slots(self, batch: DraftBatch, slots: MaskSlots, context: Sequence[KeysAndValues]) -> Tensor:
        """Return stream_MD of mask slots after the last layer."""
        positions_1M = (slots.rows.at(batch.positions_BT) + slots.ahead_M)[None]
        entered = self.mask_entering(batch.tokens_BT.device)
        for layer, following, of_layer in zip_longest(self.each_layer, self.deep_layers, context):
            attend = mask_slots(slots, *of_layer)
            stream_1MD, *_ = run_layer(layer, entered, positions_1M, attend, recompute=self.recomputing)
            if following is not None:
                entered = following.entering(stream_1MD)
        return stream_1MD[0]

    def mask_entering(self, device: torch.device) -> Entered:
        """Return (inputs_11X, residual_11D), with which every mask slot enters the first layer."""
        token_11 = torch.full((1, 1), self.mask_token_id, device=device)
        hidden_11F = self.mask_hidden.to(compute_dtype(self.fc.weight))
        return self.entering(self.embed(token_11), self.fused(hidden_11F))

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the fusion, of the real rows, and of the mask slots that a step keeps.

        The projections of the first layer are those of one mask slot. Attention to the slots of a row is not counted.
        """
        choice = cast(DroppedDepths, self.rows_asked()[0].choice)
        yield matrix(parameters_of(self.fc), shape.positions, gradients=1)
        yield matrix(parameters_of(*self.each_layer), shape.positions, gradients=2)
        width = sum(layer.attention_width for layer in self.each_layer)
        yield attention(width, shape.pairs, gradients=2)
        yield matrix(self.lm_head.weight.numel(), shape.rows(1 + self.lag), gradients=2)
        if self.num_depths == 1:
            return
        first = self.midlayer.self_attn
        of_slot = parameters_of(*self.each_layer) - parameters_of(first.q_proj, first.k_proj, first.v_proj)
        depths = range(2, self.num_depths + 1)
        kept = [
            (sum(choice.most(last - start + 1, depth) for depth in depths), (start + last) / 2 - 1)
            for start, last in shape.spans
        ]
        slots = sum(count for count, _ in kept) or 1
        yield matrix(of_slot, slots, gradients=2)
        yield attention(width, round(sum(count * columns for count, columns in kept)), gradients=2)
        yield matrix(self.lm_head.weight.numel(), slots, gradients=2)

    def trained_as(self, own: dict[str, Any]) -> Self:
        """Return this drafter in training mode, with these training settings."""
        made = super().trained_as(own)
        made.mask_hidden.requires_grad_(made.num_depths > 1)
        return made

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the layers except for their attention."""
        self.__dict__["entering"] = compiled(self.entering)
        for layer in self.each_layer:
            layer.__dict__["finish"] = compiled(layer.finish)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and trees."""
        return PEagleProposer(self, target, listener)

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the fusion, the layers, the head with its norm), and the bytes of one embedding row."""
        fusion, _, head, row = super().decoding_weights()
        if self.embed_tokens is not None:
            row = self.embed_tokens.weight.shape[1] * self.embed_tokens.weight.element_size()
        width = sum(layer.attention_width for layer in self.each_layer)
        return fusion, weights_of(*self.each_layer, attention_width=width), head, row


def _rows(states_MD: Tensor, place_n: Tensor) -> Tensor:
    """Return states_1nD at these places; of one place, which nothing reads, if there are none."""
    return states_MD.index_select(0, place_n if len(place_n) else place_n.new_zeros(1))[None]
