"""The base of block drafters: training on blocks at chosen roots, the proposer, and the folder.

A kind changes what it needs to: `new_layer` and its `through` (what enters and leaves a sublayer), `drafted` (the states, head
and further losses of training), `proposer_class` and its `extend` (how the tokens of a chain depend on each other).

A = blocks, B = slots of a block, K = draft tokens of a block, T = positions, N = slots of all rows, D = hidden
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput, PackedDocuments
from drafttrain.core.errors import CheckpointError
from drafttrain.core.few_sizes import is_compiled_by_size
from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowChoice, RowsAsked
from drafttrain.core.weights import Weights
from drafttrain.drafters import Drafter
from drafttrain.drafters.dflash.attention import attend_blocks, later_slots
from drafttrain.drafters.dflash.backbone import Backbone
from drafttrain.drafters.dflash.blocks import Blocks
from drafttrain.drafters.dflash.config import new_config, read_block_config
from drafttrain.drafters.dflash.own_head import WithHead
from drafttrain.drafters.dflash.proposer import BlockProposer
from drafttrain.drafters.dflash.settings import OWN, BlockSettings
from drafttrain.drafters.eagle.folder import load_weights, save_folder
from drafttrain.drafters.eagle.layer import compute_dtype
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.warm_start import checkpoint_folder
from drafttrain.losses.align import rows_of
from drafttrain.losses.row_choice import Anchors
from drafttrain.target_model import Target

BLOCKS_AT_ONCE = 1024
"""Blocks of a pass without gradients: validation reads a block at every slot."""


class BlockDrafter(Backbone, WithHead, Drafter):
    """Row t of depth d predicts token t + d (lag 0) from the root, token t, and the target's features of tokens before it."""

    lag = 0
    needs_target = True
    recomputes = True
    compiles = True
    adapted_in = ("fc", "layers")
    architecture: ClassVar[str]
    settings_class: ClassVar[type[BlockSettings]]
    own_names: ClassVar[tuple[str, ...]] = OWN
    """Settings that are stored in the drafter folder."""
    proposer_class: ClassVar[type[BlockProposer]] = BlockProposer

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__(config, parts)
        self.own: dict[str, Any] = config["drafttrain"]
        self.draft = self.own["draft"]
        self.add_head(config)

    @classmethod
    def create(cls, settings: BlockSettings, *, target: Target | None, tokenizer: Any) -> Self:
        """Return the drafter as training starts from it. An own vocabulary is the first ids until `fit_vocabulary` runs."""
        if target is None:
            raise CheckpointError(f"drafter.kind {cls.kind} reads the target's hidden states, but target.model is null")
        own = {name: getattr(settings, name) for name in cls.own_names}
        if settings.checkpoint is not None:
            made = cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target)
            made.config["drafttrain"] = made.own = own
            made.draft, made._keeps_vocabulary = own["draft"], True
            return made.train()
        config: dict[str, Any] = {
            "architectures": [cls.architecture],
            **new_config(settings, target),
            **cls.fields(settings),
            "drafttrain": own,
        }
        config["dflash_config"] |= cls.block_fields(settings)
        made = cls(config, TargetParts(target))
        made.start_head()
        return made

    @classmethod
    def own_defaults(cls) -> dict[str, Any]:
        """Return the defaults of the settings that are stored in the drafter folder."""
        defaults = cls.settings_class()
        return {name: getattr(defaults, name) for name in cls.own_names}

    @classmethod
    def fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return further fields of config.json that a kind needs."""
        return {}

    @classmethod
    def block_fields(cls, settings: Any) -> Mapping[str, Any]:
        """Return further fields of its `dflash_config` that a kind needs."""
        return {}

    @classmethod
    def problems_of(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of config.json that only this kind has."""
        return []

    @property
    def deepest(self) -> int:
        """One draft token per slot that predicts."""
        return self.num_depths

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def rows_asked(self) -> Sequence[RowsAsked]:
        """Return the rows of every depth, of the roots that are drawn in each document."""
        return [RowsAsked(tuple(range(1, self.num_depths + 1)), self.lag, choice=Anchors(self.own["anchors"]))]

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth: in training of blocks at the chosen roots, else of a block at every slot."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        features_1NF = self.features(batch.target).flatten(0, 1)[None]
        context = [
            (keys_1GNd[0], values_1GNd[0])
            for keys_1GNd, values_1GNd in self.context(features_1NF, batch.positions_BT.flatten()[None])
        ]
        blocks = self.blocks(batch)
        parts = [blocks] if torch.is_grad_enabled() else list(blocks.parts(BLOCKS_AT_ONCE))
        hidden_AKD = torch.cat([self._hidden(batch, part, context) for part in parts])
        return self.drafted(hidden_AKD, blocks, batch)

    def blocks(self, batch: DraftBatch) -> Blocks:
        """Return the blocks of a forward."""
        documents = batch.packed_documents or PackedDocuments.of(batch.positions_BT)
        if not self.training:
            return Blocks.every(batch.tokens_BT, documents)
        rows = rows_of(batch, self.rows_asked()[0])
        assert rows.slots_A is not None, "the choice is one of roots"
        # With lag 0, the target's position of a root's first label is the root itself.
        on_host = rows.targets_on_host[: rows.counts[1]] if rows.counts[1] else torch.zeros(1, dtype=torch.long)
        blocks = Blocks.of(rows.slots_A, documents, on_host=on_host)
        by_size = is_compiled_by_size(self.fc.weight.device, compute_dtype(self.fc.weight))
        return blocks.padded(documents) if by_size else blocks

    def _hidden(self, batch: DraftBatch, blocks: Blocks, context: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return hidden_AKD, the states that predict."""

        hidden_ABO = later_slots(blocks, self.block_size) if self.causal else None

        def attend(of_layer: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend_blocks(query, (key, value), of_layer, blocks, hidden_ABO=hidden_ABO)

        states_ABD = self.block_states(
            blocks.at(batch.tokens_BT),
            blocks.at(batch.positions_BT),
            [partial(attend, of_layer) for of_layer in context],
        )
        return self.predicting(states_ABD)

    def drafted(self, hidden_AKD: Tensor, blocks: Blocks, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth with their head, and further losses of a kind.

        Args:
            hidden_AKD: The states of the slots that predict, after the final norm.
        """
        return DraftOutput(
            self.by_depth(hidden_AKD, batch),
            self.head,
            self.lag,
            depth_weights=self.depth_weights,
            vocabulary=self.vocabulary,
            choice=self.choice,
        )

    def by_depth(self, states_AKD: Tensor, batch: DraftBatch) -> dict[int, Tensor]:
        """Return the states of each depth: in training states_1AD of the chosen roots, else states_BTD of every slot."""
        depths = min(batch.num_depths or self.num_depths, self.num_depths)
        shape = (1, -1) if self.training else batch.tokens_BT.shape
        rows = states_AKD.unbind(1)[:depths]
        return {depth: rows_AD.unflatten(0, shape) for depth, rows_AD in enumerate(rows, start=1)}

    @property
    def choice(self) -> RowChoice | None:
        """The choice of the rows that a forward computes; None: all."""
        return self.rows_asked()[0].choice if self.training else None

    @property
    def depth_weights(self) -> dict[int, float]:
        """Factor on the loss of each depth, exp(-(d - 1) / gamma)."""
        return {depth: math.exp((1 - depth) / self.own["gamma"]) for depth in range(1, self.num_depths + 1)}

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the context, once for each position, and of the blocks."""
        blocks = shape.blocks(self.own["anchors"])
        keys = [each for layer in self.each_layer for each in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        width = sum(layer.self_attn.q_proj.out_features for layer in self.each_layer)
        yield matrix(parameters_of(self.fc), shape.positions, gradients=1)
        yield matrix(parameters_of(*keys), shape.positions, gradients=2)
        yield matrix(parameters_of(self.layers), blocks.roots * self.block_size, gradients=2)
        pairs = blocks.pairs * self.block_size + blocks.roots * self._own_pairs()
        yield attention(width, pairs, gradients=2)
        for depth in range(1, self.num_depths + 1):
            yield matrix(self.head_parameters, blocks.rows(depth), gradients=1 if self.lm_head is None else 2)

    def _own_pairs(self) -> int:
        """Return the pairs of a slot and a slot of its block that it attends to."""
        size = self.block_size
        return size * (size + 1) // 2 if self.causal else size * size

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and trees."""
        return self.proposer_class(
            self,
            vocab_size=target.vocab_size,
            num_tokens=target.num_tokens,
            device=target.device,
            listener=listener,
        )

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the context, a block, the head), and the bytes of one embedding row."""
        return *self.layer_weights(), self.head_weights, self._parts.embedding_row_bytes

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, whose names engines load."""
        save_folder(folder, self.config, self)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Self:
        """Read the folder that `save` wrote; refuse a target with other sizes."""
        config = read_block_config(folder, target, own=cls.own_defaults(), problems_of=cls.problems_of)
        drafter = cls(config, TargetParts(target))
        load_weights(folder, drafter, dtype=dtype or "float32")
        drafter.check_vocabulary(f"{folder}/model.safetensors")
        return drafter.eval().to(target.device)
