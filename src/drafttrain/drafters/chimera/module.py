"""Chimera: the drafter's network, its training forward and its folder.

B = sequences, T = positions, V = the target's vocabulary, R = the drafter's, D = hidden, N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.printable import shown
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters import drafters
from drafttrain.drafters.chimera.proposer import ChimeraProposer
from drafttrain.drafters.chimera.rollout import rollout
from drafttrain.drafters.chimera.settings import OWN, ChimeraSettings, own_defaults
from drafttrain.drafters.chimera.trigrams import SIZE
from drafttrain.drafters.draft_vocabulary import size_for
from drafttrain.drafters.eagle.drafter import EagleDrafter
from drafttrain.drafters.eagle.folder import load_weights, read_config
from drafttrain.drafters.eagle.layer import compute_dtype
from drafttrain.drafters.eagle.layer_config import layer_config, llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.medusa.blocks import ResidualBlocks, uninitialized_linear
from drafttrain.drafters.own_vocabulary import OwnVocabulary
from drafttrain.drafters.p_eagle.stack import DeepLayer
from drafttrain.drafters.warm_start import checkpoint_folder
from drafttrain.target_model import Target

SHARED_HEAD = "shared_head"
"""Field of config.json: one head for all draft tokens."""


@drafters.register("chimera", ChimeraSettings)
class ChimeraDrafter(OwnVocabulary, EagleDrafter):
    """Row t of depth k predicts token t + k + 1 (lag 1), from the target's final states up to t and tokens up to t + k.

    The trigram encoder makes a state of each newer token and the two before it. The layer reads it, attends to the target's final
    states and to the trigram states of the newer tokens before it, and the head of depth k reads the result beside the target's state
    at t. Heads start as the target's head on both, so their logits start as LM(state) + LM(target's state).

    Source: Zeng et al. 2024, Chimera, arXiv 2402.15758.
    """

    kind = "chimera"
    lag = 1
    needs_target = True
    adapted_in = ("fc", "blocks", "layer")
    serving: ClassVar[str] = (
        "No serving engine loads this kind. It drafts chains and trees in the embedded evaluator only."
    )

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__()
        self.config = config
        self.own = config["drafttrain"]
        self.draft = self.own["draft"]
        self._parts = parts
        width, sizes = config["hidden_size"], llama_config(config)
        self.blocks = ResidualBlocks(SIZE * width, 1)
        self.fc = nn.Linear(SIZE * width, width, bias=False)
        nn.init.normal_(self.fc.weight, std=sizes.initializer_range)
        self.layer = DeepLayer(sizes)
        # `start_head` or `load` writes these matrices: drawing them first takes minutes for a large vocabulary.
        self.lm_heads = nn.ModuleList(
            uninitialized_linear(2 * width, config["draft_vocab_size"], bias=False, device=self.fc.weight.device)
            for _ in range(1 if config[SHARED_HEAD] else self.num_steps)
        )
        self.add_vocabulary(config)

    @classmethod
    def create(cls, settings: ChimeraSettings, *, target: Target | None, tokenizer: Any) -> ChimeraDrafter:
        """Return the drafter as training starts from it. Its vocabulary is the first ids until `fit_vocabulary` runs."""
        if target is None:
            raise CheckpointError("drafter.kind chimera reads the target's final states, but target.model is null")
        if getattr(target.model.get_output_embeddings(), "bias", None) is not None:
            raise CheckpointError(
                f"{target.name}: its output head has a bias, which Chimera's heads cannot start from: use another drafter.kind"
            )
        own = {name: getattr(settings, name) for name in OWN}
        if settings.checkpoint is not None:
            made = cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target)
            made._keeps_vocabulary = True
            return made.trained_as(own | {"num_steps": made.num_steps})
        config = {
            "architectures": ["ChimeraModel"],
            **layer_config(
                target,
                num_heads=settings.num_heads,
                num_kv_heads=settings.num_kv_heads,
                intermediate_size=settings.intermediate_size,
            ),
            "draft_vocab_size": size_for(target, settings.draft_vocab_size),
            SHARED_HEAD: settings.shared_head,
            "drafttrain": own,
        }
        drafter = cls(config, TargetParts(target))
        drafter.start_head()
        return drafter

    @torch.no_grad()
    def start_head(self) -> None:
        """Copy the target's head, or its rows of this vocabulary, to both halves of every head."""
        ids_R = torch.arange(self.config["vocab_size"]) if self.vocabulary is None else self.vocabulary
        rows_RD = self._parts.head_rows(ids_R)
        for weight_RX in self.lm_heads.parameters():
            weight_RX.copy_(torch.cat([rows_RD, rows_RD], dim=1))

    @property
    def num_steps(self) -> int:
        """Draft tokens of a round."""
        return int(self.own["num_steps"])

    @property
    def deepest(self) -> int:
        """One draft token for each head."""
        return self.num_steps

    def needs(self) -> TargetNeeds:
        """Return the state after the final norm."""
        return TargetNeeds(final=True)

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTD: the state after the final norm."""
        assert seen.final_BTD is not None, "the trainer reads what `needs` returns"
        return seen.final_BTD.to(self.fc.weight.device, compute_dtype(self.fc.weight))

    def trigram_states(self, tokens_BN3: Tensor) -> Tensor:
        """Return states_BND of trigrams."""
        return self.encoded(self.embed(tokens_BN3).flatten(-2))

    def encoded(self, embedded_BNX: Tensor) -> Tensor:
        """Return states_BND of the three embeddings of each token, one after another."""
        states_BND: Tensor = self.fc(self.blocks(embedded_BNX))
        return states_BND

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return, for every depth, what its head reads: the state of the newest token, and the target's at the slot."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        num_steps = min(batch.num_depths or self.num_steps, self.num_steps)
        slots, features_BTD = self.slots(batch, num_steps=num_steps), self.features(batch.target)
        states = rollout(self, batch, features_BTD, num_steps=num_steps, slots=slots, recompute=self.recomputing)
        known_1MD = slots.queries(slots.columns(features_BTD))
        read = {
            depth: slots.spread(torch.cat([state_1MD, known_1MD], dim=-1), batch.tokens_BT)
            for depth, state_1MD in states.items()
        }
        weights = {depth: self.own["step_decay"] ** (depth - 1) for depth in read}
        return DraftOutput(read, self._head, self.lag, depth_weights=weights, vocabulary=self.vocabulary)

    @property
    def _head(self) -> LinearHead:
        return LinearHead(self.head_of, after=self._parts.finish)

    def head_of(self, depth: int) -> nn.Module:
        """Return the output matrix of a depth."""
        return self.lm_heads[0 if self.config[SHARED_HEAD] else depth - 1]

    def head(self, states_NX: Tensor, depth: int) -> Tensor:
        """Return logits_NR of what the head of a depth reads."""
        return self._head(states_NX, depth)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the trigram encoder, and the layer except for its attention."""
        self.__dict__["encoded"] = compiled(self.encoded)
        self.layer.__dict__["finish"] = compiled(self.layer.finish)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of every token, of the target's states, and of every depth. Attention to newer tokens is not counted."""
        part, slots = self.layer.self_attn, shape.rollout(self.num_steps)
        of_keys = parameters_of(part.k_proj, part.v_proj)
        of_query = parameters_of(part.q_proj)
        # Embeddings need no gradient.
        yield matrix(parameters_of(self.blocks), shape.positions, gradients=1)
        yield matrix(parameters_of(self.fc) + of_query + of_keys, shape.positions, gradients=2)
        yield matrix(of_keys, slots.columns, gradients=2)
        for depth in range(1, self.num_steps + 1):
            yield matrix(parameters_of(self.layer) - of_query - of_keys, slots.queries, gradients=2)
            yield attention(self.layer.attention_width, slots.pairs, gradients=2)
            yield matrix(parameters_of(self.head_of(depth)), shape.rows(depth + self.lag), gradients=2)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and trees."""
        return ChimeraProposer(self, target, listener)

    @property
    def embedding_row_bytes(self) -> int:
        """Bytes of one row of the target's embedding."""
        return self._parts.embedding_row_bytes

    @property
    def finish_logits(self) -> Callable[[Tensor], Tensor] | None:
        """The elementwise scale or soft cap of the target's logits."""
        return self._parts.finish

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> ChimeraDrafter:
        """Read the folder that `save` wrote; refuse a target with other sizes."""
        config = read_config(folder, target, own=own_defaults())
        if type(config.get(SHARED_HEAD)) is not bool:
            raise CheckpointError(
                f"{folder}/config.json: {SHARED_HEAD} must be true or false, got {shown(config.get(SHARED_HEAD))}"
            )
        drafter = cls(
            {**config, "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"]}, TargetParts(target)
        )
        load_weights(folder, drafter, dtype=dtype or "float32")
        drafter.check_vocabulary(f"{folder}/model.safetensors")
        return drafter.eval().to(target.device)
