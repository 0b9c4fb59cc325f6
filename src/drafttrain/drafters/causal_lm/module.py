"""The independent drafter: a separate, smaller causal LM, with the target's tokenizer or its own.

B = sequences, T = positions, V = vocabulary, R = tokens that both vocabularies have, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.causal_lm.across_tokenizers import EncodedText, SharedTokens
from drafttrain.drafters.causal_lm.cut import cut_config, cut_from
from drafttrain.drafters.causal_lm.cut_choice import CutChoice
from drafttrain.drafters.causal_lm.cut_settings import CutSettings
from drafttrain.drafters.causal_lm.dense import dense_config, dense_from
from drafttrain.drafters.causal_lm.layer_parallel import check_layer_parallel
from drafttrain.drafters.causal_lm.own_text import own_text
from drafttrain.drafters.causal_lm.projected import projected
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.causal_lm.retokenized import RetokenizedProposer
from drafttrain.drafters.causal_lm.scratch import scratch_llama
from drafttrain.drafters.input_mask import InputMask
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, linears_in, lora_problems
from drafttrain.drafters.recomputing import run_part
from drafttrain.drafters.start_choice import StartChoice
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.attention import drafter_attention
from drafttrain.target_model.documents import as_read, assume_plain, document_states, probe
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.logits import head_of, some_rows
from drafttrain.target_model.matrix_products import head_parameters, trunk_products
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from drafttrain.target_model.positions import max_positions
from drafttrain.target_model.sized_target import read_sizes, sized_model
from drafttrain.target_model.tokenizer import check_same_tokenizer, load_tokenizer, num_ids


@dataclass
class CausalLMSettings:
    """A separate small causal LM."""

    init: Literal["scratch", "checkpoint", "target"] = setting(
        "scratch",
        help="scratch: a random Llama of the size below. checkpoint: trained weights. target: layers of the target (`cut`).",
    )
    checkpoint: str | None = setting(
        None, help="checkpoint: folder or hub id, with the target's tokenizer, or that of `tokenizer`."
    )
    tokenizer: str | None = setting(
        None,
        help="Folder or hub id of a tokenizer of its own: it drafts only tokens that the target has too. null: the target's.",
    )
    num_layers: int = setting(2, help="scratch, target: decoder layers.", ge=1)
    cut: CutSettings = setting(CutSettings(), help="target: the part of the target that it starts from.")
    hidden_size: int = setting(96, help="scratch: width.", ge=8)
    intermediate_size: int | None = setting(
        None,
        help="Feed-forward width; target: the strongest neurons are kept. null: 8/3 hidden, or the target's.",
        ge=1,
    )
    num_heads: int = setting(3, help="scratch: attention heads; serving engines want hidden/heads of 32 or more.", ge=1)
    num_kv_heads: int | None = setting(None, help="scratch: key-value heads; null: as many as heads.", ge=1)
    embedding_init: Literal["random", "target"] = setting(
        "random",
        help="scratch: the embedding, which is the head too: random, or the target's head rows, projected to hidden_size.",
    )
    input_mask_ratio: float = setting(
        0.0,
        help="Share of the tokens that it reads in training that are replaced by the mask token (MEAP). Labels are not.",
        ge=0,
        lt=1,
    )
    mask_token_id: int | None = setting(
        None, help="The mask token; null: an id of the drafter's vocabulary that no text has.", ge=0
    )
    freeze_embedding: bool = setting(False, help="Leave embedding and head as they start.")
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax as vLLM does (then the node is FIXED)."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if self.init == "checkpoint" and not self.checkpoint:
            problems.append("checkpoint: init 'checkpoint' needs a folder or hub id")
        if self.init != "checkpoint" and self.checkpoint:
            problems.append(f"checkpoint: is not used with init {self.init!r}; set init: checkpoint")
        if self.init == "target":
            problems += self.cut.problems(num_layers=self.num_layers)
        elif self.cut != CutSettings():
            problems.append(f"cut: is not used with init {self.init!r}; set init: target")
        if self.init == "scratch" and self.hidden_size % self.num_heads:
            problems.append(f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.init != "scratch" and self.embedding_init != "random":
            problems.append(f"embedding_init: is not used with init {self.init!r}, which has an embedding of its own")
        for key, start in (("init", self.init), ("embedding_init", self.embedding_init)):
            if self.tokenizer is not None and start == "target":
                problems.append(
                    f"{key}: 'target' starts from rows of the target's vocabulary, and the drafter has another one: remove tokenizer, or set "
                    f"{key}: {'scratch or checkpoint' if key == 'init' else 'random'}"
                )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.lora is not None and self.freeze_embedding:
            problems.append("freeze_embedding: with lora all weights are frozen: leave it out")
        if self.tokenizer is not None and self.lora is not None and self.lora.dropout:
            problems.append(
                f"lora.dropout: is drawn for the target's tokens, and a drafter with its own tokenizer reads others: set 0, got {self.lora.dropout:g}"
            )
        if self.mask_token_id is not None and not self.input_mask_ratio:
            problems.append("mask_token_id: is not used with input_mask_ratio 0")
        if self.tokenizer is not None and self.input_mask_ratio:
            problems.append(
                "input_mask_ratio: is drawn for the target's tokens, and a drafter with its own tokenizer reads others: set 0, got "
                f"{self.input_mask_ratio:g}"
            )
        starts_from = None if self.init == "scratch" else self.init
        return problems + lora_problems(self.lora, starts_from=starts_from, has_dropout=True)


@drafters.register("causal_lm", CausalLMSettings)
class CausalLMDrafter(Drafter):
    """An independent drafter. Lag 0, depth 1: row t is the distribution of token t + 1.

    Source: Leviathan et al. 2022, arXiv 2211.17192; distilled as in Goel et al. 2024, arXiv 2403.00858.
    """

    kind = "causal_lm"
    lag = 0
    recomputes = True
    compiles = True
    writes_text = True
    serving: ClassVar[str] = "Any engine that drafts with a separate language model of the same tokenizer can load it."

    def __init__(self, model: Any, *, draft: str = "sampled", other: OtherTokenizer | None = None) -> None:
        super().__init__()
        self.model = model
        self.draft = draft
        self.other = other
        """Its own tokenizer; None: it reads and drafts the target's ids."""
        self.input_mask: InputMask | None = None
        """What it does not read in training; None: it reads every token."""

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode, but keep the model itself in evaluation mode.

        Dropout, skipped layers and router noise would make a drafter that equals its target differ from it, and a resumed
        run differ from one that never stopped.
        """
        super().train(mode)
        self.model.eval()
        return self

    @property
    def language_model(self) -> Any:
        """The model itself."""
        return self.model

    @classmethod
    def why_whole_target(cls, settings: CausalLMSettings) -> str | None:
        """Return the reason if its layers are cut from the target's."""
        return "init: target cuts the drafter from the target's blocks" if settings.init == "target" else None

    @classmethod
    def start_choice(cls, settings: CausalLMSettings) -> StartChoice | None:
        """Return the choice of the target's layers and experts, as far as texts decide."""
        return CutChoice(settings) if settings.init == "target" and settings.cut.chooses else None

    @classmethod
    def create(cls, settings: CausalLMSettings, *, target: Target | None, tokenizer: Any) -> Self:
        """Return the drafter as training starts from it."""
        other, own = None, tokenizer
        if settings.tokenizer is not None:
            own = load_tokenizer(resolve_folder(settings.tokenizer))
            other = OtherTokenizer(
                tokenizer,
                own,
                target_rows=target.vocab_size if target else None,
                name=f"drafter.tokenizer {settings.tokenizer}",
            )
            other.check()
        if settings.init == "scratch":
            model = scratch_llama(
                settings,
                vocab_size=target.vocab_size if target and other is None else num_ids(own),
                num_positions=max_positions(target.model.config) if target and other is None else None,
                tokenizer=own,
            )
            if settings.embedding_init == "target":
                model.get_input_embeddings().weight.data.copy_(_head_rows(target, width=settings.hidden_size))
        elif settings.init == "target":
            if target is None:
                raise CheckpointError(
                    "drafter.init is 'target' but target.model is null: there is no target to cut the drafter from"
                )
            cut = settings.cut
            layers = cut.layer_numbers(len(blocks(target.model)), settings.num_layers)
            whole = target.model if cut.experts is None else dense_from(target.model, cut)
            model = cut_from(whole, layers, width=settings.intermediate_size)
        else:
            assert settings.checkpoint is not None
            folder = resolve_folder(settings.checkpoint)
            check_same_tokenizer(
                own, load_tokenizer(folder), drafter=settings.checkpoint, whose="target" if other is None else "recipe"
            )
            model = load_causal_lm(folder, attention=drafter_attention(target and target.model))
        drafter = cls._of(model, settings, other)
        drafter.train_with(settings, target=target, tokenizer=tokenizer)
        return drafter

    def train_with(self, settings: CausalLMSettings, *, target: Target | None, tokenizer: Any) -> None:
        """Freeze its embedding and mask what it reads in training, if the settings say so."""
        if settings.freeze_embedding:
            for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                part.requires_grad_(False)
        if settings.input_mask_ratio:
            self.input_mask = InputMask.of(self.model, settings, target=target, tokenizer=tokenizer)

    @classmethod
    def sized(cls, settings: CausalLMSettings, *, target: Target, tokenizer: Any) -> Self:
        """Return the drafter; of a checkpoint or a target only config.json is read."""
        # Which token is the mask changes no size, and needs the tokenizer, which may not be there.
        sizes = replace(settings, input_mask_ratio=0.0, mask_token_id=None)
        if settings.init == "scratch":
            drafter = cls.create(sizes, target=target, tokenizer=tokenizer)
        else:
            config = (
                sized_cut(target.model, settings) if settings.checkpoint is None else read_sizes(settings.checkpoint)[0]
            )
            drafter = cls._of(sized_model(config, "float32", attention=drafter_attention(target.model)), settings)
            drafter.train_with(sizes, target=target, tokenizer=tokenizer)
        assume_plain(drafter.model)
        return drafter

    @classmethod
    def _of(cls, model: Any, settings: CausalLMSettings, other: OtherTokenizer | None = None) -> Self:
        return cls(model, draft=settings.draft, other=other)

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile each layer. They share their code, so it is compiled once."""
        for block in blocks(self.model):
            block.__dict__["forward"] = compiled(block.forward)

    def recompute_activations(self) -> None:
        """Store only the input of each layer."""
        super().recompute_activations()
        # Hugging Face's own switch acts only in training mode, which the model is never in.
        for block in blocks(self.model):
            block.__dict__["forward"] = partial(run_part, block.forward, recompute=True)

    def adaptable(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the model but for its head, which the loss multiplies by itself."""
        head = self.model.get_output_embeddings()
        return {name: layer for name, layer in linears_in(self).items() if layer is not head}

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token that both vocabularies have; None: the drafter has the target's tokenizer."""
        return None if self.other is None else self.other.target_R.to(next(self.parameters()).device)

    def with_own_text(self, batch: DraftBatch) -> DraftBatch:
        """Return a batch with its documents in the drafter's own tokens."""
        return batch if self.other is None or batch.own is not None else replace(batch, own=own_text(batch, self.other))

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of depth 1; with its own tokenizer, after the own token that ends where the target's token ends."""
        if self.lora is not None:
            # Its forwards read other tokens than the batch's.
            probe(self.model)
            drops = self.training and self.lora.settings.dropout
            self.lora.draw(as_read(self.model, batch.seed_BT, batch.positions_BT) if drops else None)
        if self.other is not None:
            return self._from_own_text(batch, self.other)
        if self.input_mask is not None and self.training:
            batch = self.input_mask.on(batch)
        return self._of_target_ids(batch)

    def _of_target_ids(self, batch: DraftBatch) -> DraftOutput:
        states_BTD, _ = document_states(
            self.model, batch.tokens_BT, batch.positions_BT, documents=batch.packed_documents
        )
        return DraftOutput({1: states_BTD}, head_of(self.model), self.lag)

    def _from_own_text(self, batch: DraftBatch, other: OtherTokenizer) -> DraftOutput:
        own = self.with_own_text(batch).own
        assert own is not None
        states_BSD, _ = document_states(self.model, own.tokens_BS, own.positions_BS, documents=own.documents)
        states_BTD = states_BSD.flatten(0, 1)[own.slot_BT]
        head = some_rows(head_of(self.model), other.own_R.to(states_BTD.device))
        return DraftOutput({1: states_BTD}, head, self.lag, vocabulary=self.vocabulary, readable_BT=own.readable_BT)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of all blocks, and of the head for each trained label."""
        yield from trunk_products(self.model, shape, gradients=2)
        trained = self.model.get_output_embeddings().weight.requires_grad
        yield matrix(head_parameters(self.model), shape.rows(1), gradients=2 if trained else 1)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the chain proposer over this model."""
        if self.other is not None:
            return self._in_own_tokens(self.other, target, listener)
        return ChainProposer(
            self.model,
            target_vocab_size=target.vocab_size,
            num_tokens=target.num_tokens,
            listener=listener,
            draft=self.draft,
            layer_parallel_size=self.layer_parallel_size,
        )

    def _in_own_tokens(self, other: OtherTokenizer, target: Target, listener: ForwardListener | None) -> Proposer:
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        drafts = ChainProposer(
            self.model,
            target_vocab_size=rows,
            num_tokens=num_ids(other.own),
            listener=listener,
            # The walk compares strings with the target's draw. A draw of the drafter's matches it less often than its likeliest token.
            draft="greedy" if self.drafts_strings else self.draft,
            only=None if self.drafts_strings else other.own_R,
            layer_parallel_size=self.layer_parallel_size,
        )
        shared = SharedTokens(other, vocab_size=target.vocab_size)
        return RetokenizedProposer(drafts, other, EncodedText(other) if self.drafts_strings else shared)

    def draft_strings(self) -> bool:
        """Draft any own token, if it has its own tokenizer, and propose the target's tokens of the text."""
        self.drafts_strings = self.other is not None
        return self.drafts_strings

    def run_layers_parallel(self, size: int) -> None:
        """From now on, draft with the attention of `size` layers on the same states."""
        check_layer_parallel(self.model)
        self.layer_parallel_size = size

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder; with the tokenizer if it is the drafter's own."""
        self.model.save_pretrained(folder)
        if self.other is not None:
            self.other.own.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Self:
        """Read a plain Hugging Face folder; refuse a tokenizer that shares too few tokens with the target's."""
        own, other = load_tokenizer(folder), None
        if own.get_vocab() != target.tokenizer.get_vocab():
            other = OtherTokenizer(target.tokenizer, own, target_rows=target.vocab_size, name=str(folder))
            other.check()
        return cls._of_folder(folder, target, dtype, other)

    @classmethod
    def _of_folder(cls, folder: Path, target: Target, dtype: Any, other: OtherTokenizer | None = None) -> Self:
        attention = drafter_attention(target.model)
        model = load_causal_lm(folder, dtype=dtype or "float32", attention=attention).eval().to(target.device)
        rows = int(model.get_input_embeddings().weight.shape[0])
        if problem := rows_problem(
            rows, num_ids(other.own) if other else target.num_tokens, whose="its own" if other else "the target's"
        ):
            raise CheckpointError(f"{folder}/config.json: {problem}")
        return cls(model, other=other)


def sized_cut(model: Any, settings: CausalLMSettings) -> Any:
    """Return the configuration of a drafter that is cut from a target; the layers that texts choose have the sizes of others."""
    total = len(blocks(model))
    layers = settings.cut.any_choice().layer_numbers(total, settings.num_layers)
    config = model.config if settings.cut.experts is None else dense_config(model, settings.cut)
    return cut_config(config, layers, total=total, width=settings.intermediate_size)


def _head_rows(target: Target | None, *, width: int) -> Tensor:
    if target is None:
        raise CheckpointError("drafter.embedding_init is 'target' but target.model is null: there is no target")
    return projected(target.model.get_output_embeddings().weight, width)


def rows_problem(rows: int, num_tokens: int, *, whose: str = "the target's") -> str | None:
    """Return why a model with `rows` embedding rows cannot read a tokenizer with `num_tokens` tokens; None: it can."""
    if rows >= num_tokens:
        return None
    return f"vocab_size is {rows}, {whose} tokenizer has {num_tokens} tokens: the last ones have no row"
