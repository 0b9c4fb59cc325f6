"""HAMburger: what is trained (the target, an embedder of segments, a micro decoder), its loss and its folder.

B = sequences, T = positions, N = slots of all sequences, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.foreign import one_of, read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.tensors import load_into
from drafttrain.drafters import drafters
from drafttrain.drafters.drafter import DRAFTS
from drafttrain.drafters.drafts_itself import DraftsItself, DraftsItselfSettings
from drafttrain.drafters.hamburger.embedder import SegmentEmbedder
from drafttrain.drafters.hamburger.merged_lm import ReadingParts
from drafttrain.drafters.hamburger.merged_target import MergedTarget
from drafttrain.drafters.hamburger.micro_decoder import MicroDecoder
from drafttrain.drafters.hamburger.proposer import MicroStepProposer
from drafttrain.drafters.hamburger.reading import InSegments, places_of, read_in_segments
from drafttrain.drafters.hamburger.segments import Segments
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.drafters.tuned_target import tuned, tuning_in
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.cached_lm import MASKED_ATTENTION
from drafttrain.target_model.matrix_products import head_parameters
from drafttrain.target_model.rolling_back import window_of

NUM_TAPS = 4
MOST = 4096
"""Of the places in a segment and of the layers of the micro decoder, in a folder from outside."""


@dataclass(kw_only=True)
class HamburgerSettings(DraftsItselfSettings):
    """The target tuned to read its answer in segments of several tokens, and to draft the rest of a segment in micro steps."""

    segment: int = setting(4, help="Most tokens of a segment; a round drafts one less.", ge=2)
    low_entropy: float = setting(
        0.05, help="A training token joins the segment before it if its entropy is below this many nats.", ge=0
    )
    entropy_ratio: float = setting(0.3, help="Or below this share of the largest entropy in that segment.", ge=0, le=1)
    continue_above: float = setting(
        0.9,
        help="In decoding a segment goes on where the stop head gives this probability to it; above 1 every token is a segment, which is "
        "plain decoding of the tuned target. It is a part of the distribution that is served, and stored with the weights.",
        ge=0,
    )
    num_layers: int = setting(4, help="Layers of the micro decoder.", ge=1)
    features: list[int] | None = setting(
        None,
        help="The target's states that the micro decoder reads: after how many blocks, each. null: four, evenly, the last block's among them.",
    )
    text_weight: float = setting(1.0, help="Weight of the recipe's loss, on the text read in segments.", gt=0)
    stop_weight: float = setting(0.5, help="Weight of the stop head's cross-entropy.", ge=0)
    head_lr_multiplier: float = setting(
        1.0, help="The learning rate of embedder and micro decoder is this times train.lr.", gt=0
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: a draw at each micro step, or its argmax."
    )


@drafters.register("hamburger", HamburgerSettings)
class Hamburger(DraftsItself):
    """The tuned target, its embedder of segments, and the micro decoder that drafts.

    L = text_weight * (the recipe's loss on the target that reads segments) + cross-entropy of the micro decoder at the tokens that
    join a segment + stop_weight * cross-entropy of the stop head at the labels.

    Source: Liu et al. 2025, HAMburger, arXiv 2505.20438.
    """

    kind = "hamburger"
    why_alone = "drafts within one segment only"
    compiles = True
    serving: ClassVar[str] = """\
TARGET is the original. What is served is another model: the target with adapter/ of this folder (peft's format), or target/, that
reads its answers in segments with the embedder in model.safetensors. No serving engine reads segments:
`drafttrain eval DRAFTER --target TARGET` does. The authors' code, Jingyu6/hamburger, has another layout of weights."""

    def __init__(
        self,
        target: Target,
        *,
        size: int,
        num_layers: int,
        taps: tuple[int, ...],
        continue_above: float,
        draft: str = "sampled",
        text_weight: float = 1.0,
        stop_weight: float = 0.5,
    ) -> None:
        super().__init__()
        width, num_heads, intermediate_size = _sizes(target)
        self.embedder = SegmentEmbedder(width, num_heads, size)
        sizes = {"num_layers": num_layers, "num_taps": len(taps), "size": size}
        self.micro = MicroDecoder(width, num_heads, intermediate_size, **sizes)
        self.size = size
        self.taps = taps
        self.continue_above = continue_above
        self.draft = draft
        self.text_weight = text_weight
        self.stop_weight = stop_weight
        self.head_lr_multiplier = 1.0

    @classmethod
    def create(cls, settings: HamburgerSettings, *, target: Target | None, tokenizer: Any) -> Hamburger:
        """Return the target as it is, with weights to tune it, an embedder that takes means, and a random micro decoder."""
        if target is None:
            raise CheckpointError("drafter.kind is 'hamburger' but target.model is null: the target itself is tuned")
        made = cls(
            target,
            size=settings.segment,
            num_layers=settings.num_layers,
            taps=_taps(settings.features, target, key="drafter.features"),
            continue_above=settings.continue_above,
            draft=settings.draft,
            text_weight=settings.text_weight,
            stop_weight=settings.stop_weight,
        )
        made.head_lr_multiplier = settings.head_lr_multiplier
        made.tune(target, settings)
        return made.double() if target.model.dtype == torch.float64 else made

    @classmethod
    def notes(cls, settings: HamburgerSettings) -> TextNotes | None:
        """Return the segments of the texts."""
        return Segments(settings.segment, settings.low_entropy, settings.entropy_ratio)

    @property
    def deepest(self) -> int:
        """The rest of a segment."""
        return self.size - 1

    @property
    def parts(self) -> ReadingParts:
        """What the target reads segments with."""
        return ReadingParts(self.embedder, self.micro, self.taps, self.continue_above)

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of the tuned target, which reads the text in segments, with the losses of the micro decoder in training."""
        joins_BT = _joins(batch)
        read = self.read(batch, joins_BT)
        drafted = DraftOutput({1: read.final_BTD}, self.in_training.head, self.lag)
        if not self.training:
            return drafted
        assert batch.altered is not None, "the run attaches the segments"
        states_BTD = self.micro_states(read, joins_BT)
        extra_loss = self.loss_of_altered(read.final_BTD, states_BTD, batch.tokens_BT, batch.altered)
        extra_loss = extra_loss + self.stop_weight * self._stop_loss(states_BTD, batch, joins_BT)
        return replace(drafted, depth_weights={1: self.text_weight}, extra_loss=extra_loss)

    def read(self, batch: DraftBatch, joins_BT: Tensor) -> InSegments:
        """Return what the tuned target computes of a batch that is read in these segments."""
        model = self.in_training.target.model
        with self.in_training.on(batch):
            return read_in_segments(
                model, self.embedder, batch.tokens_BT, batch.positions_BT, joins_BT, hidden=self.taps
            )

    def micro_states(self, read: InSegments, joins_BT: Tensor) -> Tensor:
        """Return the micro decoder's states_BTD: that of token t predicts token t + 1, as the next one of the same segment."""
        place_N = places_of(joins_BT.flatten(), self.size)
        # The segment before a token's own. Before the first one of a text there is none; nothing is trained there.
        macro_N = (torch.arange(len(place_N), device=place_N.device) - place_N - 1).clamp(min=0)
        macro_NFD = torch.stack([read.hidden_BTD[index].flatten(0, 1) for index in self.taps], dim=1)
        states_ND: Tensor = self.micro(macro_NFD, read.embedded_BTD.flatten(0, 1), macro_N, place_N)
        return states_ND.unflatten(0, joins_BT.shape)

    def loss_of_altered(
        self, final_BTD: Tensor, altered_BTD: Tensor, tokens_BT: Tensor, altered: AlteredText
    ) -> Tensor:
        """Return -log q of the tokens that join a segment.

        Args:
            altered_BTD: The micro decoder's states.
        """
        labels_N = tokens_BT.flatten().index_select(0, altered.slots_N + 1)
        loss_N = cross_entropy(self.logits_at(altered_BTD, altered.slots_N), labels_N, reduction="none")
        return (altered.weights_N * loss_N).sum()

    def _stop_loss(self, states_BTD: Tensor, batch: DraftBatch, joins_BT: Tensor) -> Tensor:
        """Return the sum of the stop head's cross-entropies at labels after which a label may join."""
        has_room_BT = places_of(joins_BT.flatten(), self.size).unflatten(0, joins_BT.shape) < self.size - 1
        label_BT = batch.loss_mask_BT & (batch.positions_BT > 0)
        judged_BT = label_BT[:, :-1] & label_BT[:, 1:] & has_room_BT[:, :-1]
        logits_BT = self.micro.goes_on(states_BTD[:, :-1].flatten(0, 1)).unflatten(0, judged_BT.shape)
        loss_BT = binary_cross_entropy_with_logits(logits_BT.float(), joins_BT[:, 1:].float(), reduction="none")
        same_BT = batch.documents_BT[:, :-1] == batch.documents_BT[:, 1:]
        return (loss_BT * (judged_BT & same_BT)).sum()

    def lr_factor(self, name: str) -> float:
        """Return the factor on train.lr for a parameter."""
        return 1.0 if name.startswith("weights.") else self.head_lr_multiplier

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the embedder and the layers of the micro decoder."""
        for part in (self.embedder, *self.micro.layers):
            part.__dict__["forward"] = compiled(part.forward)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of one pass through the target, of the embedder and the micro decoder, and of the head at the labels.

        Attention within segments is not counted.
        """
        yield from self.in_training.products(shape)
        yield matrix(parameters_of(self.embedder), self.size * shape.positions, gradients=2)
        rows = (1 + len(self.taps)) * shape.positions
        yield matrix(parameters_of(self.micro.layers), rows, gradients=2)
        yield matrix(parameters_of(self.micro.stop), shape.positions, gradients=2)
        yield matrix(head_parameters(self.in_training.target.model), 2 * shape.rows(1), gradients=1)

    @contextmanager
    def adapting(self, target: Target) -> Iterator[Target]:
        """Within this context, yield the target that reads segments, as it is tuned so far."""
        with super().adapting(target) as so_far:
            yield MergedTarget(so_far, self.parts)

    def adapted(self, target: Target) -> Target:
        """Return the tuned target that reads segments."""
        return MergedTarget(tuned(target, self.tuning), self.parts)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer, which drafts from the states of `MergedTarget`; that reports its calls."""
        return MicroStepProposer(vocab_size=target.vocab_size, num_tokens=target.num_tokens, draft=self.draft)

    def numbers(self) -> Mapping[str, Any]:
        """Return the sizes, and where a segment goes on."""
        return {
            "hidden_size": self.embedder.q_proj.in_features,
            "segment": self.size,
            "num_layers": len(self.micro.layers),
            "features": list(self.taps),
            "continue_above": self.continue_above,
            "draft": self.draft,
        }

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Hamburger:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The numbers are damaged, or of another target.
        """
        path = folder / "config.json"
        config: Any = read_json(path)
        size, num_layers, above = (config.get(name) for name in ("segment", "num_layers", "continue_above"))
        problems = [
            f"{name} must be a whole number of {least} to {MOST}, got {value!r:.60}"
            for name, value, least in (("segment", size, 2), ("num_layers", num_layers, 1))
            if type(value) is not int or not least <= value <= MOST
        ]
        if type(above) not in (int, float) or not above >= 0:
            problems.append(f"continue_above must be a number of at least 0, got {above!r:.60}")
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}")
        made = cls(
            target,
            size=size,
            num_layers=num_layers,
            taps=_taps(config.get("features"), target, key=f"{path}: features"),
            continue_above=above,
            draft=one_of(config, "draft", DRAFTS, path=path),
        )
        made.tuning = tuning_in(folder)
        made.to(target.device, getattr(torch, dtype) if isinstance(dtype, str) else dtype or target.model.dtype)
        load_into(made, folder / "model.safetensors")
        return made.eval()


def _joins(batch: DraftBatch) -> Tensor:
    """Return joins_BT: whether a token joins the segment of the one before it."""
    joins_N = torch.zeros(batch.tokens_BT.numel(), dtype=torch.bool, device=batch.tokens_BT.device)
    if batch.altered is not None:
        joins_N = joins_N.index_fill(0, batch.altered.slots_N + 1, value=True)
    return joins_N.view(batch.tokens_BT.shape)


def _taps(given: Any, target: Target, *, key: str) -> tuple[int, ...]:
    """Return the tapped states: the given ones, or four at even distances, the last block's output among them."""
    count = len(blocks(target.model))
    if given is None:
        return tuple(sorted({-(-count * number // NUM_TAPS) for number in range(1, NUM_TAPS + 1)}))
    if not (
        isinstance(given, list)
        and given
        and all(type(one) is int and 0 <= one <= count for one in given)
        and sorted(set(given)) == given
    ):
        raise CheckpointError(f"{key}: must be different numbers of 0..{count} in rising order, got {given!r:.60}")
    return tuple(given)


def _sizes(target: Target) -> tuple[int, int, int]:
    """Return (hidden size, heads, width of the MLP) of the embedder and the micro decoder: those of the target.

    Raises:
        CheckpointError: The target cannot read segments.
    """
    config = target.model.config.get_text_config()
    problems = []
    if (window := window_of(config, name="target")) is not None:
        problems.append(
            f"it has a sliding window of {window} tokens, and a cache with one entry a segment has no such window"
        )
    if (attention := target.model.config._attn_implementation) not in MASKED_ATTENTION:
        problems.append(f"target.attention {attention} takes no mask: set {' or '.join(MASKED_ATTENTION)}")
    width, num_heads = int(config.hidden_size), int(config.num_attention_heads)
    if width % num_heads or width % 2:
        problems.append(f"its hidden size {width} is odd, or no multiple of its {num_heads} heads")
    if problems:
        raise CheckpointError(f"drafter.kind hamburger cannot tune {target.name}: {'; '.join(problems)}")
    return width, num_heads, int(getattr(config, "intermediate_size", None) or 4 * width)
