"""EAGLE-3 and 3.1: one decoder layer over the target's states at several depths, trained on its own rollouts.

B = sequences, T = positions, V = the target's vocabulary, R = the drafter's, D = hidden, F = D for each tap, N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters import drafters
from drafttrain.drafters.draft_vocabulary import SIZE_HELP, size_for
from drafttrain.drafters.eagle.drafter import EagleDrafter, rollout
from drafttrain.drafters.eagle.folder import load_weights, read_config
from drafttrain.drafters.eagle.layer import EagleLayer, Norm, compute_dtype
from drafttrain.drafters.eagle.layer_config import layer_config, llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.few_rows import product_with
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, lora_problems
from drafttrain.drafters.own_vocabulary import OwnVocabulary
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, checkpoint_folder, settings_fixed_by_checkpoint
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks

NUM_TAPS = "num_aux_hidden_states"
"""The field of config.json from which engines take the number of tapped states. Without it they assume three."""

FIXED_BY_CHECKPOINT = (
    *("taps", "draft_vocab_size", "num_heads", "num_kv_heads", "intermediate_size"),
    *("head_init", "norm_before_fc", "fc_norm", "norm_before_residual"),
)
"""Settings that the checkpoint to start from fixes."""


@dataclass
class FusionSettings:
    """A layer over the target's hidden states of several depths: what EAGLE-3 and its parallel form share."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP)
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    taps: list[int] | None = setting(
        None,
        help="Blocks of 0..layers - 1, any number, in rising order, whose input states are read; null: an early, the middle and "
        "a late one.",
        ge=0,
    )
    draft_vocab_size: int | None = setting(None, help=SIZE_HELP, ge=1)
    num_heads: int | None = setting(None, help="Attention heads; null: the target's.", ge=1)
    num_kv_heads: int | None = setting(None, help="Key-value heads; null: the target's.", ge=1)
    intermediate_size: int | None = setting(None, help="Feed-forward width; null: the target's.", ge=1)
    head_init: Literal["target", "random"] = setting(
        "target", help="Initial head and final norm: the target's (the head's rows of the draft vocabulary), or random."
    )
    norm_before_fc: bool = setting(False, help="Apply one norm to the concatenated states before fc.")
    fc_norm: bool = setting(False, help="Apply a norm to each tapped state before fc (EAGLE-3.1).")
    norm_before_residual: bool = setting(
        False, help="The residual stream starts from the normed fused state, not from the fused state."
    )
    fixed: ClassVar[tuple[str, ...]] = FIXED_BY_CHECKPOINT

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = settings_fixed_by_checkpoint(self, self.fixed)
        if self.taps is not None and (not self.taps or sorted(set(self.taps)) != self.taps):
            problems.append(f"taps: must be one or more different blocks in rising order, got {self.taps}")
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        return problems + lora_problems(self.lora, starts_from=self.checkpoint)


@dataclass
class Eagle3Settings(FusionSettings):
    """One layer over the target's hidden states of several depths, trained on its own rollouts (EAGLE-3)."""

    num_steps: int = setting(5, help="Draft tokens rolled out at every position in training.", ge=1)
    step_decay: float = setting(0.8, help="Factor on the loss from one of these steps to the next.", gt=0, le=1)
    norm_output: bool = setting(False, help="Feed back the state after the final norm (EAGLE-3.1), not before it.")
    draft: Literal["sampled", "greedy"] = setting(
        "sampled",
        help="Chains at temperature > 0: draft by sampling, or by argmax as vLLM does (then nodes are FIXED).",
    )
    fixed: ClassVar[tuple[str, ...]] = (*FIXED_BY_CHECKPOINT, "norm_output")

    def smoke(self) -> Eagle3Settings:
        """Return a copy with few rollout steps, enough for a test."""
        return replace(self, num_steps=min(self.num_steps, 3))


class MidLayer(EagleLayer):
    """The layer with a norm for each of its two inputs, the embedding and the hidden state, which it reads concatenated."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, input_size=2 * config.hidden_size)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)


OWN = ("num_steps", "step_decay", "head_init", "draft")
"""Settings that are stored in the drafter folder."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of the settings that are stored in the drafter folder."""
    return {name: getattr(Eagle3Settings(), name) for name in OWN}


@drafters.register("eagle3", Eagle3Settings)
class Eagle3Drafter(OwnVocabulary, EagleDrafter):
    """Row t of depth d predicts token t + d + 1 (lag 1), from features up to token t and tokens up to t + d.

    Source: Li et al. 2025, EAGLE-3, arXiv 2503.01840.
    """

    kind = "eagle3"
    own_names: ClassVar[tuple[str, ...]] = OWN
    settings_class: ClassVar[type[FusionSettings]] = Eagle3Settings
    lag = 1
    needs_target = True
    serving: ClassVar[str] = "It drafts trees in the embedded evaluator only."

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__()
        self.config = config
        self.own = config["drafttrain"]
        self.draft = self.own["draft"]
        self.taps: tuple[int, ...] = tuple(config["eagle_aux_hidden_state_layer_ids"])
        self._parts = parts
        layer, width, eps = llama_config(config), config["hidden_size"], config["rms_norm_eps"]
        self.input_norm = Norm(len(self.taps) * width, eps=eps) if config.get("norm_before_fc") else None
        self.fc = nn.Linear(len(self.taps) * width, width, bias=False)
        self.midlayer = MidLayer(layer)
        self.norm = Norm(width, eps=eps)
        self.lm_head = nn.Linear(width, config["draft_vocab_size"], bias=False)
        for linear in (self.fc, self.lm_head):
            nn.init.normal_(linear.weight, std=layer.initializer_range)
        self.fc_norm = nn.ModuleList(Norm(width, eps=eps) for _ in self.taps) if config["fc_norm"] else None
        self.add_vocabulary(config)

    @classmethod
    def create(cls, settings: FusionSettings, *, target: Target | None, tokenizer: Any) -> Self:
        """Return the drafter as training starts from it. Its vocabulary is the first ids until `fit_vocabulary` runs."""
        if target is None:
            raise CheckpointError(f"drafter.kind {cls.kind} reads the target's hidden states, but target.model is null")
        own = {name: getattr(settings, name) for name in cls.own_names}
        if settings.checkpoint is not None:
            made = cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target).trained_as(own)
            made._keeps_vocabulary = True
            return made
        drafter = cls({**cls.new_config(settings, target), "drafttrain": own}, TargetParts(target))
        drafter.start_weights()
        return drafter

    @classmethod
    def new_config(cls, settings: Any, target: Target) -> dict[str, Any]:
        """Return the fields of config.json of a new drafter, which engines read."""
        return {**fusion_config(settings, target), "norm_output": settings.norm_output}

    def start_weights(self) -> None:
        """Copy what training starts from."""
        self.start_head()

    @torch.no_grad()
    def start_head(self) -> None:
        """Copy the target's head (the rows of this vocabulary) and its final norm."""
        if self.own["head_init"] == "random":
            return
        ids_R = torch.arange(self.config["vocab_size"]) if self.vocabulary is None else self.vocabulary
        self.lm_head.weight.copy_(self._parts.head_rows(ids_R))
        self.norm.weight.copy_(self._parts.final_gain())

    def needs(self) -> TargetNeeds:
        """Return the tapped states."""
        return TargetNeeds(hidden=self.taps)

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every step of the rollout."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        num_steps = batch.num_depths or self.own["num_steps"]
        slots = self.slots(batch, num_steps=num_steps)
        states = rollout(
            self, batch, self.features(batch.target), num_steps=num_steps, slots=slots, recompute=self.recomputing
        )
        weights = {depth: self.own["step_decay"] ** (depth - 1) for depth in states}
        return DraftOutput(states, self._head, self.lag, depth_weights=weights, vocabulary=self.vocabulary)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the fusion and of every rollout step.

        Attention to a slot's own keys of earlier steps is not counted.
        """
        normed = self.input_norm is not None or self.fc_norm is not None
        rollout = shape.rollout(self.own["num_steps"])
        yield matrix(parameters_of(self.fc), rollout.columns, gradients=2 if normed else 1)
        for depth in range(1, self.own["num_steps"] + 1):
            yield from self.layer.products(rollout, num_keys=rollout.columns if depth == 1 else rollout.queries)
            yield matrix(parameters_of(self.lm_head), shape.rows(depth + self.lag), gradients=2)

    @property
    def layer(self) -> EagleLayer:
        """The decoder layer."""
        return self.midlayer

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTF: the tapped states, concatenated."""
        return torch.cat([seen.hidden_BTD[tap] for tap in self.taps], dim=-1).to(
            self.fc.weight.device, compute_dtype(self.fc.weight)
        )

    def fused(self, features_BTF: Tensor) -> Tensor:
        """Return hidden_BTD."""
        if self.input_norm is not None:
            features_BTF = self.input_norm(features_BTF)
        if self.fc_norm is not None:
            pieces = features_BTF.chunk(len(self.taps), dim=-1)
            features_BTF = torch.cat([norm(piece) for norm, piece in zip(self.fc_norm, pieces, strict=True)], dim=-1)
        hidden_BTD: Tensor = self.fc(features_BTF)
        return hidden_BTD

    def entering(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return both inputs normed and concatenated, and the hidden state as the residual stream."""
        normed_BTD = self.midlayer.hidden_norm(hidden_BTD)
        inputs_BTX = torch.cat([self.midlayer.input_layernorm(embedded_BTD), normed_BTD], dim=-1)
        return inputs_BTX, normed_BTD if self.config["norm_before_residual"] else hidden_BTD

    def fed_back(self, state_BTD: Tensor) -> Tensor:
        """Return the layer's output; with `norm_output`, after the final norm."""
        return self.norm(state_BTD) if self.config["norm_output"] else state_BTD

    @property
    def _head(self) -> LinearHead:
        return LinearHead(lambda _: self.lm_head, before=self.norm)

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NR."""
        logits_NR: Tensor = self.lm_head(self.norm(states_ND))
        return logits_NR

    def decoding_head(self) -> Callable[[Tensor], Tensor]:
        """Return `head`, with its weights prepared for few rows."""
        product = product_with([self.lm_head])
        return lambda states_ND: product(self.norm(states_ND))

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the fusion, the layer, the head with its norm), and the bytes of one embedding row."""
        fusion = [part for part in (self.input_norm, self.fc_norm, self.fc) if part is not None]
        layer = weights_of(self.midlayer, attention_width=self.layer.attention_width)
        return weights_of(*fusion), layer, weights_of(self.norm, self.lm_head), self._parts.embedding_row_bytes

    @classmethod
    def field_problems(cls, config: Mapping[str, Any]) -> list[str]:
        """Return one line for every wrong field of config.json that a kind has beyond EAGLE-3's."""
        return []

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Self:
        """Read the folder that `save` wrote; refuse a target with other sizes."""
        defaults = cls.settings_class()
        config = read_config(folder, target, own={name: getattr(defaults, name) for name in cls.own_names})
        if problems := cls.field_problems(config):
            raise CheckpointError("\n  ".join([f"{folder}: this drafter cannot be loaded", *problems]))
        config |= {
            "eagle_aux_hidden_state_layer_ids": taps_of(
                len(blocks(target.model)), config.get("eagle_aux_hidden_state_layer_ids")
            ),
            "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
        }
        drafter = cls(config, TargetParts(target))
        load_weights(folder, drafter, dtype=dtype or "float32")
        drafter.check_vocabulary(f"{folder}/model.safetensors")
        return drafter.eval().to(target.device)


def fusion_config(settings: FusionSettings, target: Target) -> dict[str, Any]:
    """Return the fields of config.json of a new drafter with one layer. Width and unset sizes are the target's."""
    taps = taps_of(len(blocks(target.model)), settings.taps)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_config(
            target,
            num_heads=settings.num_heads,
            num_kv_heads=settings.num_kv_heads,
            intermediate_size=settings.intermediate_size,
        ),
        "draft_vocab_size": size_for(target, settings.draft_vocab_size),
        "target_hidden_size": int(target.model.config.get_text_config().hidden_size),
        "eagle_aux_hidden_state_layer_ids": taps,
        NUM_TAPS: len(taps),
        "norm_before_fc": settings.norm_before_fc,
        "fc_norm": settings.fc_norm,
        "norm_before_residual": settings.norm_before_residual,
    }


def taps_of(num_layers: int, given: Sequence[int] | None = None) -> list[int]:
    """Return the blocks whose input states are read: those given, or an early, the middle and a late one.

    With ten layers or more the defaults are EAGLE-3's: 2, half, and three before the end.

    Raises:
        CheckpointError: The taps are none, out of range or not in rising order, or the target has too few layers for the defaults.
    """
    if given is not None:
        taps = list(given)
        if not taps or sorted(set(taps)) != taps or not 0 <= taps[0] <= taps[-1] < num_layers:
            raise CheckpointError(
                f"drafter.taps must be one or more different blocks in rising order, of 0..{num_layers - 1} for this target "
                f"({num_layers} layers), got {taps}"
            )
        return taps
    if num_layers < 3:
        raise CheckpointError(
            f"drafter.taps is null, which needs three blocks, and this target has {num_layers} "
            f"layer{'s' if num_layers > 1 else ''}: name one or more of 0..{num_layers - 1}"
        )
    if num_layers >= 10:
        return [2, num_layers // 2, num_layers - 3]
    return [int(num_layers > 3), num_layers // 2, num_layers - 1]
