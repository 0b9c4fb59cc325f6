"""Kangaroo: the target's first blocks, then an adapter of one attention block and two norms, then the target's own head.

B = sequences, T = positions, D = hidden, H = heads, d = width of a head, N = rows, V = the target's vocabulary, R = the drafter's
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput, Head, PackedDocuments
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.core.foreign import read_json
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.tensors import load_into
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import weights_of
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.draft_vocabulary import SIZE_HELP, most_frequent, size_for, token_map_problems
from drafttrain.drafters.few_rows import head_product
from drafttrain.drafters.kangaroo.adapter import Adapter
from drafttrain.drafters.kangaroo.proposer import KangarooProposer
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.logits import finisher, head_of, rows_of_head
from drafttrain.target_model.matrix_products import head_parameters
from drafttrain.target_model.packed_attention import Columns

CONFIG_KEYS = ("exit_layer", "hidden_size", "num_attention_heads", "rope_theta", "draft", "target_fingerprint")


@dataclass
class KangarooSettings:
    """An adapter after the target's first blocks; the head is the target's own."""

    exit_layer: int = setting(2, help="Target blocks before the adapter: from 1 to one less than the target has.", ge=1)
    num_heads: int | None = setting(None, help="Attention heads of the adapter; null: as many as the target.", ge=1)
    draft_vocab_size: int | None = setting(None, help=f"{SIZE_HELP} Drafting uses the head's rows for these.", ge=1)
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax (then nodes are FIXED)."
    )


@drafters.register("kangaroo", KangarooSettings)
class KangarooDrafter(Drafter):
    """g = norm_out(f + attention(norm_in(f))), where f is the state that enters block `exit_layer`; the head reads g.

    Lag 0, depth 1: row t is the distribution of token t + 1, like the target's own row t. It starts as the raw early exit:
    the attention adds nothing, and norm_out is the target's final norm. The target is not a submodule, so it is neither
    trained nor stored.

    Source: Liu et al. 2024, Kangaroo, arXiv 2404.18911; weights are named as in the paper's code.
    """

    kind = "kangaroo"
    drafts_trees = False
    why_alone = "runs the target's first blocks on its own nodes only"
    recomputes = True
    compiles = True
    lag = 0
    needs_target = True
    serving = """\
No serving engine loads an adapter after a target's first layers yet; these figures are from the embedded evaluator.

    drafttrain eval DRAFTER --target TARGET"""

    def __init__(
        self,
        target: Target,
        *,
        exit_layer: int,
        num_heads: int,
        rope_theta: float,
        draft: str,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        total = len(blocks(target.model))
        if not 1 <= exit_layer < total:
            raise CheckpointError(
                f"exit_layer must be 1..{total - 1} for this target ({total} layers), got {exit_layer}"
            )
        self.exit_layer = exit_layer
        self.draft = draft
        self.adapter = Adapter(
            final_norm(target.model),
            _width(target),
            num_heads=num_heads,
            rope_theta=rope_theta,
            draft_vocab_size=draft_vocab_size,
        )
        self._model = (target.model,)
        self._fingerprint = target.fingerprint

    @classmethod
    def create(cls, settings: KangarooSettings, *, target: Target | None, tokenizer: Any) -> KangarooDrafter:
        """Return the raw early exit."""
        if target is None:
            raise CheckpointError(
                "drafter.kind is 'kangaroo' but target.model is null: its first blocks are the target's"
            )
        config = target.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        drafter = cls(
            target,
            exit_layer=settings.exit_layer,
            num_heads=settings.num_heads or int(config.num_attention_heads),
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            draft=settings.draft,
            draft_vocab_size=settings.draft_vocab_size and size_for(target, settings.draft_vocab_size),
        )
        return drafter.double() if target.model.dtype == torch.float64 else drafter

    def fit_vocabulary(self, label_counts: Callable[[], Any]) -> None:
        """Choose the most frequent labels, ties by lower id."""
        if self.vocabulary is not None:
            (model,) = self._model
            vocab_size = len(model.get_output_embeddings().weight)
            self.vocabulary.copy_(most_frequent(label_counts(), size=len(self.vocabulary), vocab_size=vocab_size))
            self.__dict__.pop("_rows", None)

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token that can be drafted; None: all tokens can."""
        return self.adapter.token_map

    @cached_property
    def _rows(self) -> tuple[nn.Linear]:
        """The target's output matrix, or a copy of its rows that are drafted from; in a tuple, so that it is no submodule."""
        (model,) = self._model
        return (model.get_output_embeddings() if self.vocabulary is None else rows_of_head(model, self.vocabulary),)

    @property
    def _head(self) -> Head:
        (model,) = self._model
        if self.vocabulary is None:
            return head_of(model)
        return LinearHead(lambda _: self._rows[0], after=finisher(model.config.get_text_config()))

    def needs(self) -> TargetNeeds:
        """Return the state that enters the exit layer."""
        return TargetNeeds(hidden=(self.exit_layer,))

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of depth 1, from the target's states of the batch."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        exit_BTD = batch.target.hidden_BTD[self.exit_layer]
        documents = batch.packed_documents or PackedDocuments.of(batch.positions_BT)

        def in_its_document(query_BHTd: Tensor, keys_BHTd: Tensor, values_BHTd: Tensor) -> Tensor:
            return Columns(keys_BHTd, values_BHTd, documents).attend(query_BHTd)

        states_BTD = self.adapter(exit_BTD, batch.positions_BT, in_its_document, recompute=self.recomputing)
        return DraftOutput({1: states_BTD}, self._head, self.lag, vocabulary=self.vocabulary)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the adapter except for its attention, which is a kernel already."""
        for layer in self.adapter.blocks:
            layer.__dict__["project"] = compiled(layer.project)
            layer.__dict__["finish"] = compiled(layer.finish)
        self.adapter.norm.__dict__["forward"] = compiled(self.adapter.norm.forward)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the adapter, and of the target's frozen head for each trained label."""
        (model,) = self._model
        rows = head_parameters(model) if self.vocabulary is None else parameters_of(*self._rows)
        yield matrix(parameters_of(self.adapter), shape.positions, gradients=2)
        yield attention(self.adapter.width, shape.pairs, gradients=2)
        yield matrix(rows, shape.rows(1), gradients=1)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer, which uses the target's own cache."""
        return KangarooProposer(
            self.adapter,
            head_product(target.model, None if self.vocabulary is None else self._rows[0]),
            head_weights=weights_of(*self._rows),
            dtype=target.model.dtype,
            exit_layer=self.exit_layer,
            vocabulary=DraftVocabulary(self.vocabulary, num_tokens=target.num_tokens),
            vocab_size=target.vocab_size,
            listener=listener,
            draft=self.draft,
        )

    def save(self, folder: Path) -> None:
        """Write the adapter, and the map of its vocabulary if it has one."""
        adapter = self.adapter
        values = (self.exit_layer, adapter.width, adapter.num_heads, adapter.rope_theta, self.draft, self._fingerprint)
        config = {"model_type": self.kind} | dict(zip(CONFIG_KEYS, values, strict=True))
        if self.vocabulary is not None:
            config["draft_vocab_size"] = len(self.vocabulary)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> KangarooDrafter:
        """Read an adapter for the target that it was trained on.

        Raises:
            CheckpointError: The files are damaged, or the adapter was trained on another target.
        """
        config = read_json(folder / "config.json")
        missing = [key for key in CONFIG_KEYS if key not in config]
        if missing:
            raise CheckpointError(f"{folder / 'config.json'}: {', '.join(missing)} missing: not a Kangaroo adapter")
        if config["hidden_size"] != _width(target):
            raise CheckpointError(
                f"{folder}: made for a target of width {config['hidden_size']}, {target.name} has {_width(target)}"
            )
        if config["target_fingerprint"] != target.fingerprint:
            raise CheckpointError(
                f"{folder}: trained on a target with fingerprint {config['target_fingerprint']}, "
                f"{target.name} has {target.fingerprint}. Train an adapter for this target, or use the one it was made for."
            )
        rows = config.get("draft_vocab_size")
        if rows is not None and not (type(rows) is int and 1 <= rows <= target.vocab_size):
            raise CheckpointError(
                f"{folder / 'config.json'}: draft_vocab_size must be 1..{target.vocab_size} or null, got {rows!r:.60}"
            )
        drafter = cls(
            target,
            exit_layer=config["exit_layer"],
            num_heads=config["num_attention_heads"],
            rope_theta=config["rope_theta"],
            draft=config["draft"],
            draft_vocab_size=rows,
        )
        drafter.to(target.device, getattr(torch, dtype) if dtype else target.model.dtype)
        load_into(drafter.adapter, folder / "model.safetensors")
        ids_R = drafter.vocabulary
        if ids_R is not None and (problems := token_map_problems(ids_R.cpu(), vocab_size=target.vocab_size)):
            raise CheckpointError(f"{folder / 'model.safetensors'}: {problems[0]}")
        return drafter.eval()


def _width(target: Target) -> int:
    return int(target.model.config.get_text_config().hidden_size)
