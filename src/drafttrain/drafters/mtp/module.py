"""MTP: a target's own next-token-prediction layer, trained on its own rollouts.

B = sequences, T = positions, V = the target's vocabulary, D = hidden, N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput, Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.tensors import TensorFiles, load_named
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.eagle.drafter import EagleDrafter, rollout
from drafttrain.drafters.eagle.folder import load_weights, read_config
from drafttrain.drafters.eagle.layer import Norm, compute_dtype
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, lora_problems
from drafttrain.drafters.mtp.block import Block, block_config, block_shapes, new_block
from drafttrain.drafters.mtp.files import read_layer
from drafttrain.drafters.mtp.layouts import BLOCK, LAYOUTS, Layout, layout_in, layout_named
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, checkpoint_folder, settings_fixed_by_checkpoint
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.mimo import MIMO

ROWS_AT_ONCE = 1024
"""Rows whose logits exist at the same time when the drafter's own tokens are chosen."""


@dataclass
class MtpSettings:
    """The target's own next-token-prediction layer, trained on its own rollouts (FastMTP)."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP.replace("from scratch", "`init` says from what"))
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    init: Literal["target", "random"] = setting(
        "target",
        help="Start from the layer in the target's checkpoint, or from random weights in the sizes of its blocks.",
    )
    layout: Literal["mimo", "deepseek"] | None = setting(
        None, help="How a random layer is stored and run; null: the target's own layout, or deepseek if it has none."
    )
    engine: Literal["vllm", "transformers"] = setting(
        "vllm",
        help="The engine that will run it: with the deepseek layout, vllm zeroes the embedding at position 0, transformers does "
        "not.",
    )
    num_steps: int = setting(3, help="Draft tokens rolled out at every position in training.", ge=1)
    step_decay: float = setting(0.6, help="Factor on the loss from one of these steps to the next.", gt=0, le=1)
    feed: Literal["data", "own"] = setting(
        "data",
        help="From the second step on, embed the data's tokens, or the drafter's own likeliest ones; labels stay the data's.",
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled",
        help="Chains at temperature > 0: draft by sampling, or by argmax as vLLM does (then nodes are FIXED).",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = settings_fixed_by_checkpoint(self, ("init", "layout", "engine"))
        if self.layout and self.init != "random":
            problems.append("layout: the target's checkpoint fixes it: leave it out, or set init: random")
        if self.layout == "mimo" and self.engine == "transformers":
            problems.append("engine: transformers does not run the mimo layout: vllm does")
        starts_from = self.checkpoint or (self.init if self.init == "target" else None)
        return problems + lora_problems(self.lora, starts_from=starts_from)

    def smoke(self) -> MtpSettings:
        """Return a copy with few rollout steps, enough for a test."""
        return replace(self, num_steps=min(self.num_steps, 2))


OWN = ("num_steps", "step_decay", "feed", "draft")
"""Settings that are stored in the drafter folder."""

RUN_AS = ("hidden_first", "feature", "fed_back", "zero_first")
"""Fields of the layout that are stored in config.json: how the layer is run."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of the settings that are stored in the drafter folder."""
    return {name: getattr(MtpSettings(), name) for name in OWN}


@drafters.register("mtp", MtpSettings)
class MtpDrafter(EagleDrafter):
    """Row t of depth d predicts token t + d + 1 (lag 1), from the target's last state of token t and tokens up to t + d.

    x = P [norm_e(E[token t + 1]) ; norm_h(h)], one decoder layer of the target's kind, a norm, the target's head. Embedding and
    head are the target's, frozen. `model.mtp_layers` or `model.layers.N` of the target's checkpoint holds the rest.

    Source: DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437, 2.2; Cai et al. 2025, FastMTP, arXiv 2509.18362, 3.
    """

    kind = "mtp"
    lag = 1
    needs_target = True
    serving: ClassVar[str] = "It drafts trees in the embedded evaluator only."

    def __init__(self, config: dict[str, Any], target: Target) -> None:
        super().__init__()
        self.config = config
        self.own = config["drafttrain"]
        self.draft = self.own["draft"]
        self._parts = TargetParts(target)
        self._num_blocks = len(blocks(target.model))
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.embedding_norm, self.hidden_norm, self.norm = (Norm(width, eps=eps) for _ in range(3))
        self.fc = nn.Linear(2 * width, width, bias=False)
        nn.init.normal_(self.fc.weight, std=config["initializer_range"])
        self.block: Block = new_block(config, target)

    @classmethod
    def create(cls, settings: MtpSettings, *, target: Target | None, tokenizer: Any) -> MtpDrafter:
        """Return the drafter as training starts from it."""
        if target is None:
            raise CheckpointError("drafter.kind mtp is a layer of the target, but target.model is null")
        own = {name: getattr(settings, name) for name in OWN}
        if settings.checkpoint is not None:
            return cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target).trained_as(own)
        if settings.init == "random":
            layout = layout_named(settings.layout or "deepseek", settings.engine)
            return cls(new_config(target, layout, own=own), target)
        files, num_blocks = target_files(target), len(blocks(target.model))
        layout = layout_named(layout_in(files.names(), num_blocks, where=str(files.folder)).name, settings.engine)
        drafter = cls(new_config(target, layout, own=own), target)
        load_named(drafter, read_layer(files, layout, num_blocks), where=str(files.folder))
        return drafter

    @classmethod
    def sized(cls, settings: MtpSettings, *, target: Target, tokenizer: Any) -> Drafter:
        """Return a layer of the sizes of the target's blocks."""
        layout: Any = settings.layout or ("mimo" if target.model.config.model_type == MIMO else "deepseek")
        random = replace(settings, checkpoint=None, init="random", layout=layout)
        return cls.create(random, target=target, tokenizer=tokenizer)

    def needs(self) -> TargetNeeds:
        """Return the target's last state, before or after its final norm."""
        if self.config["feature"] == "after_norm":
            return TargetNeeds(final=True)
        return TargetNeeds(hidden=(self._num_blocks,))

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every step of the rollout."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        num_steps = batch.num_depths or self.own["num_steps"]
        slots = self.slots(batch, num_steps=num_steps)
        drafted = self._likeliest if self.training and self.own["feed"] == "own" else None
        features_BTD = self.features(batch.target)
        states = rollout(
            self, batch, features_BTD, num_steps=num_steps, slots=slots, drafted=drafted, recompute=self.recomputing
        )
        weights = {depth: self.own["step_decay"] ** (depth - 1) for depth in states}
        return DraftOutput(states, self._head, self.lag, depth_weights=weights)

    @torch.no_grad()
    def _likeliest(self, states_1MD: Tensor, depth: int) -> Tensor:
        """Return tokens_1M, the likeliest token after each state."""
        pieces = states_1MD[0].detach().split(ROWS_AT_ONCE)
        return torch.cat([self.head(piece_ND, depth).argmax(dim=-1) for piece_ND in pieces])[None]

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of every rollout step. Attention to a slot's own keys of earlier steps is not counted."""
        rollout = shape.rollout(self.own["num_steps"])
        for depth in range(1, self.own["num_steps"] + 1):
            entering = rollout.columns if depth == 1 else rollout.queries
            yield matrix(parameters_of(self.fc), entering, gradients=2)
            yield from self.block.products(rollout, num_keys=entering)
            yield matrix(self._parts.head_parameters, shape.rows(depth + self.lag), gradients=1)

    @property
    def layer(self) -> Block:
        """The decoder layer."""
        return self.block

    @property
    def vocabulary(self) -> None:
        """None: the vocabulary is the target's."""
        return

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTD."""
        needs = self.needs()
        state_BTD = seen.final_BTD if needs.final else seen.hidden_BTD[self._num_blocks]
        assert state_BTD is not None, "the trainer reads what `needs` returns"
        return state_BTD.to(self.fc.weight.device, compute_dtype(self.fc.weight))

    def fused(self, features_BTF: Tensor) -> Tensor:
        """Return the features as they are."""
        return features_BTF

    def embed_at(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return embedded_BTD; zeros at position 0 if the engine of the layer reads zeros there."""
        embedded_BTD = self.embed(tokens_BT)
        return embedded_BTD * (positions_BT != 0)[..., None] if self.config["zero_first"] else embedded_BTD

    def entering(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed input of the layer, and its residual stream."""
        parts = [self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)]
        joined_BTD: Tensor = self.fc(torch.cat(parts[::-1] if self.config["hidden_first"] else parts, dim=-1))
        return self.block.input_layernorm(joined_BTD), joined_BTD

    def fed_back(self, state_BTD: Tensor) -> Tensor:
        """Return the layer's state, before or after the last norm."""
        return self.norm(state_BTD) if self.config["fed_back"] == "after_norm" else state_BTD

    @property
    def _head(self) -> Head:
        return self._parts.linear_head_after(self.norm)

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NV from the target's head."""
        return self._parts.head(self.norm(states_ND))

    def decoding_head(self) -> Callable[[Tensor], Tensor]:
        """Return `head`, with the weights of the target's head prepared for few rows."""
        product = self._parts.decoding_head()
        return lambda states_ND: product(self.norm(states_ND))

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (no fusion, the layer with projection and norms, the target's head), and the bytes of one embedding row."""
        parts = (self.embedding_norm, self.hidden_norm, self.fc, self.block, self.norm)
        layer = weights_of(*parts, attention_width=self.block.attention_width)
        return Weights(), layer, self._parts.head_weights, self._parts.embedding_row_bytes

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> MtpDrafter:
        """Read the folder that `save` wrote; refuse a target with other sizes."""
        config = read_config(folder, target, own=own_defaults())
        if problems := field_problems(config):
            raise CheckpointError("\n  ".join([f"{folder}: this drafter cannot be loaded", *problems]))
        drafter = cls(config, target)
        load_weights(folder, drafter, dtype=dtype or "float32")
        return drafter.eval().to(target.device)


def new_config(target: Target, layout: Layout, *, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a layer for this target.

    Raises:
        CheckpointError: The target's blocks are of a kind that is not supported.
    """
    run_as = {field: getattr(layout, field) for field in RUN_AS}
    return {**block_config(target), "layout": layout.name, **run_as, "drafttrain": dict(own)}


def target_files(target: Target) -> TensorFiles:
    """Return the tensors of a target's folder.

    Raises:
        CheckpointError: The target was not loaded from a folder.
    """
    name = str(target.model.config.get_text_config()._name_or_path)
    if not name or not Path(name).is_dir():
        raise CheckpointError(
            f"drafter.init: the next-token-prediction layer is read from the target's folder, but {target.name} was not loaded "
            "from one: set drafter.init: random"
        )
    return TensorFiles(Path(name))


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one line for every field of a drafter's config.json that does not say how the layer is stored and run."""
    sides = ("before_norm", "after_norm")
    allowed: dict[str, tuple[Any, ...]] = {"layout": tuple(LAYOUTS), "feature": sides, "fed_back": sides}
    allowed |= dict.fromkeys(("hidden_first", "zero_first", "qkv_bias", "qk_norm"), (True, False))
    return [
        f"config.json: {name} must be {' or '.join(map(str, values))}, got {config.get(name)!r:.60}"
        for name, values in allowed.items()
        if config.get(name) not in values
    ]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a drafter with this config.json, by name."""
    width = config["hidden_size"]
    outside = {f"{name}.weight": (width,) for name in ("embedding_norm", "hidden_norm", "norm")}
    block = {f"{BLOCK}{name}": shape for name, shape in block_shapes(config).items()}
    return {"fc.weight": (width, 2 * width), **outside, **block}
