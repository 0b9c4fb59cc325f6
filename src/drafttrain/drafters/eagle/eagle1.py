"""EAGLE-1: one decoder layer predicts the target's next final feature; the target's own head turns it into a distribution.

B = sequences, T = positions, V = vocabulary, D = hidden, N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, smooth_l1_loss

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowsAsked, TargetNeeds, TargetOutput
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters import drafters
from drafttrain.drafters.eagle.drafter import EagleDrafter, rollout
from drafttrain.drafters.eagle.folder import load_weights, read_config
from drafttrain.drafters.eagle.layer import EagleLayer
from drafttrain.drafters.eagle.layer_config import layer_config, llama_config
from drafttrain.drafters.eagle.target_parts import TargetParts
from drafttrain.drafters.eagle.visual import EMBEDDED, VisualEagleProposer, joined, with_visual_rows
from drafttrain.drafters.lora import LORA_HELP, LoraSettings, lora_problems
from drafttrain.drafters.warm_start import CHECKPOINT_HELP, checkpoint_folder, settings_fixed_by_checkpoint
from drafttrain.losses.align import align
from drafttrain.losses.random_rows import uniform
from drafttrain.target_model import Target

NOISE_LENGTH = 512
"""Document length at which the noise has the amplitude of the setting; longer documents get less."""

VISUAL_ID = "visual_id"
"""Field of a drafter that reads images: the token at their positions."""

FC_BIAS = "eagle_fc_bias"
"""Field of config.json: fc has a bias. Not `bias`, which engines read as biases of the attention."""


@dataclass
class Eagle1Settings:
    """One layer that predicts the target's next final feature, for the target's own head (EAGLE-1)."""

    checkpoint: str | None = setting(None, help=CHECKPOINT_HELP)
    lora: LoraSettings | None = setting(None, help=LORA_HELP)
    num_steps: int = setting(1, help="Draft tokens rolled out at every position in training; 1 as in the paper.", ge=1)
    step_decay: float = setting(0.8, help="Factor on both losses from one of these steps to the next.", gt=0, le=1)
    feature_weight: float = setting(1.0, help="Weight of the smooth L1 distance to the target's own feature.", ge=0)
    loss_weight: float = setting(
        0.1, help="Weight of the recipe's loss. The paper's cross-entropy with the target is forward_kl.", ge=0
    )
    feature_noise: float = setting(
        0.2, help="Width of the uniform noise on features in training, for a document of 512 tokens.", ge=0
    )
    num_heads: int | None = setting(None, help="Attention heads; null: the target's.", ge=1)
    num_kv_heads: int | None = setting(None, help="Key-value heads; null: the target's.", ge=1)
    intermediate_size: int | None = setting(None, help="Feed-forward width; null: the target's.", ge=1)
    visual: bool = setting(
        False,
        help="At image positions read the projector's embedding itself, without fusion or shift (MSD); needs target.images.",
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled",
        help="Chains at temperature > 0: draft by sampling, or by argmax as vLLM does (then nodes are FIXED).",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = settings_fixed_by_checkpoint(self, ("num_heads", "num_kv_heads", "intermediate_size"))
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if not self.feature_weight and not self.loss_weight:
            problems.append("feature_weight: both it and loss_weight are 0: there is no loss left")
        return problems + lora_problems(self.lora, starts_from=self.checkpoint)


OWN = ("num_steps", "step_decay", "feature_weight", "loss_weight", "feature_noise", "draft")
"""Settings that are stored in the drafter folder."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of the settings that are stored in the drafter folder."""
    return {name: getattr(Eagle1Settings(), name) for name in OWN}


@drafters.register("eagle", Eagle1Settings)
class Eagle1Drafter(EagleDrafter):
    """Row t of depth d predicts token t + d + 1 (lag 1), from final features up to token t and tokens up to t + d.

    Source: Li et al. 2024, EAGLE, arXiv 2401.15077.
    """

    kind = "eagle"
    lag = 1
    needs_target = True
    serving: ClassVar[str] = "It drafts trees in the embedded evaluator only."

    def __init__(self, config: dict[str, Any], parts: TargetParts) -> None:
        super().__init__()
        self.config = config
        self.own = config["drafttrain"]
        self.draft = self.own["draft"]
        self._parts = parts
        layer, width = llama_config(config), config["hidden_size"]
        # vLLM ignores a bias here silently, so none is trained unless the checkpoint has one. It refuses an input norm.
        self.fc = nn.Linear(2 * width, width, bias=config.get(FC_BIAS, False))
        nn.init.normal_(self.fc.weight, std=layer.initializer_range)
        self.layers = nn.ModuleList([EagleLayer(layer, input_size=width)])

    @classmethod
    def create(cls, settings: Eagle1Settings, *, target: Target | None, tokenizer: Any) -> Eagle1Drafter:
        """Return the drafter as training starts from it."""
        if target is None:
            raise CheckpointError("drafter.kind eagle reads the target's final states, but target.model is null")
        own: dict[str, Any] = {name: getattr(settings, name) for name in OWN}
        if settings.visual:
            own[VISUAL_ID] = _visual_id(target)
        if settings.checkpoint is not None:
            return cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target).trained_as(own)
        config = {
            "architectures": ["LlamaForCausalLM"],
            **layer_config(
                target,
                num_heads=settings.num_heads,
                num_kv_heads=settings.num_kv_heads,
                intermediate_size=settings.intermediate_size,
            ),
            "drafttrain": own,
        }
        return cls(config, TargetParts(target))

    def needs(self) -> TargetNeeds:
        """Return the state after the final norm; of a drafter that reads images also what entered the first block."""
        return TargetNeeds(final=True, hidden=() if self._visual_id is None else (EMBEDDED,))

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer of chains and dynamic trees."""
        if self._visual_id is None:
            return super().proposer(target, listener)
        made = VisualEagleProposer(self, target, listener)
        made.visual_id = self._visual_id
        return made

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of every step, twice: for the loss, and for the distance to the features."""
        return 2 * super().rows_asked()

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every step, and in training the loss on their distance to the target's features."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        seen = batch.target
        if self._visual_id is not None:
            seen = with_visual_rows(seen, batch.tokens_BT == self._visual_id)
        hidden_BTF = self.features(seen)
        features_BTD = hidden_BTF[..., : self.config["hidden_size"]]
        if self.training and self.own["feature_noise"]:
            added_BTD = self.own["feature_noise"] * noise(batch, width=features_BTD.shape[-1]).to(features_BTD)
            # Visual rows have no noise: they enter as they are.
            more = hidden_BTF.shape[-1] - added_BTD.shape[-1]
            hidden_BTF = hidden_BTF + (pad(added_BTD, (0, more)) if more else added_BTD)
        num_steps = batch.num_depths or self.own["num_steps"]
        slots = self.slots(batch, num_steps=num_steps)
        states = rollout(self, batch, hidden_BTF, num_steps=num_steps, slots=slots, recompute=self.recomputing)
        decay = {depth: self.own["step_decay"] ** (depth - 1) for depth in states}
        weights = {depth: self.own["loss_weight"] * factor for depth, factor in decay.items()}
        drafted = DraftOutput(states, self._parts.linear_head, self.lag, depth_weights=weights)
        if not self.training or not self.own["feature_weight"]:
            return drafted
        distance = self.own["feature_weight"] * feature_distance(drafted, batch, features_BTD, decay)
        return DraftOutput(states, self._parts.linear_head, self.lag, depth_weights=weights, extra_loss=distance)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of every rollout step. Attention to a slot's own keys of earlier steps is not counted."""
        rollout = shape.rollout(self.own["num_steps"])
        for depth in range(1, self.own["num_steps"] + 1):
            entering = rollout.columns if depth == 1 else rollout.queries
            # The inputs of the first step need no gradient.
            yield matrix(parameters_of(self.fc), entering, gradients=1 if depth == 1 else 2)
            yield from self.layer.products(rollout, num_keys=entering)
            yield matrix(self._parts.head_parameters, shape.rows(depth + self.lag), gradients=1)

    @property
    def _visual_id(self) -> int | None:
        """The token at image positions; None: the drafter reads all positions as text."""
        return self.own.get(VISUAL_ID)

    @property
    def layer(self) -> EagleLayer:
        """The decoder layer."""
        layer = self.layers[0]
        assert isinstance(layer, EagleLayer)
        return layer

    @property
    def vocabulary(self) -> None:
        """None: the vocabulary is the target's."""
        return

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTF: the state after the final norm; of a drafter that reads images also the visual rows."""
        assert seen.final_BTD is not None, "the trainer reads what `needs` returns"
        final_BTD = seen.final_BTD.to(self.fc.weight)
        if self._visual_id is None:
            return final_BTD
        return torch.cat([final_BTD, seen.hidden_BTD[EMBEDDED].to(self.fc.weight)], dim=-1)

    def fused(self, features_BTF: Tensor) -> Tensor:
        """Return the features as they are."""
        return features_BTF

    def entering(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fused input, which is also the residual stream; at a visual slot the projector's embedding."""
        width = embedded_BTD.shape[-1]
        joined_BTD: Tensor = self.fc(torch.cat([embedded_BTD, hidden_BTD[..., :width]], dim=-1))
        # The drafter's own states have no visual rows: what is drafted is text.
        if hidden_BTD.shape[-1] > width:
            joined_BTD = joined(joined_BTD, hidden_BTD[..., width:])
        return joined_BTD, joined_BTD

    def fed_back(self, state_BTD: Tensor) -> Tensor:
        """Return the predicted feature."""
        return state_BTD

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NV from the target's head, without another norm."""
        return self._parts.head(states_ND)

    def decoding_head(self) -> Callable[[Tensor], Tensor]:
        """Return `head`."""
        return self._parts.head

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (no fusion, the layer with fc, the target's head), and the bytes of one embedding row."""
        layer = weights_of(self.fc, self.layers, attention_width=self.layer.attention_width)
        return Weights(), layer, self._parts.head_weights, self._parts.embedding_row_bytes

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Eagle1Drafter:
        """Read the folder that `save` wrote; refuse a target with other sizes."""
        drafter = cls(read_config(folder, target, own=own_defaults()), TargetParts(target))
        load_weights(folder, drafter, dtype=dtype or "float32")
        return drafter.eval().to(target.device)


def _visual_id(target: Target) -> int:
    if target.visual_id is None:
        raise CheckpointError(f"drafter.visual: {target.name} is loaded without its images: set target.images: true")
    return target.visual_id


def feature_distance(drafted: DraftOutput, batch: DraftBatch, features_BTD: Tensor, decay: dict[int, float]) -> Tensor:
    """Return the smooth L1 distance of each trained row to the feature it predicts, mean over D, summed over rows.

    A row whose label is token u predicts the target's state at u - 1, from which the target predicts u.
    """
    rows = align(drafted, batch)
    features_RD = features_BTD.flatten(0, 1)
    total, first = features_RD.new_zeros(()), 0
    for depth, count in rows.counts.items():
        chosen = slice(first, first + count)
        predicted_ND = drafted.states_BTD[depth].flatten(0, 1)[rows.drafter_N[chosen]]
        distance_ND = smooth_l1_loss(predicted_ND, features_RD[rows.target_N[chosen]], reduction="none")
        total = total + decay[depth] * distance_ND.mean(dim=-1).sum()
        first += count
    return total


def noise(batch: DraftBatch, *, width: int) -> Tensor:
    """Return noise_BTD, uniform in (-1/2, 1/2) times 512 / tokens of the document.

    It depends only on step, document and position, so neither packing nor a resumed run changes it.
    """
    uniform_BTD = uniform(batch.seed_BT.flatten(), width).view(*batch.seed_BT.shape, width)
    document_N = (batch.positions_BT.flatten() == 0).cumsum(0) - 1
    length_N = torch.zeros_like(document_N).scatter_add(0, document_N, torch.ones_like(document_N))[document_N]
    return (uniform_BTD - 0.5) * (NOISE_LENGTH / length_N.view_as(batch.positions_BT)[..., None])
