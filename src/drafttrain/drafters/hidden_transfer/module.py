"""Hidden Transfer: the maps, their training forward and their folder. All other weights are the target's, which stays frozen.

B = sequences, T = positions, D = hidden, N = rows, K = draft tokens
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_text
from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.core.foreign import one_of, read_json
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked, TargetNeeds
from drafttrain.core.tensors import load_into
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.drafter import DRAFTS
from drafttrain.drafters.hidden_transfer.proposer import HiddenTransferProposer
from drafttrain.drafters.hidden_transfer.rollout import pseudo_states
from drafttrain.drafters.hidden_transfer.settings import HiddenTransferSettings, layers_of
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.logits import head_of
from drafttrain.target_model.matrix_products import head_parameters, query_width
from drafttrain.target_model.rolling_back import window_of

DRAFT_IN = ("verifying_call", "own_pass")


@drafters.register("hidden_transfer", HiddenTransferSettings)
class HiddenTransferDrafter(Drafter):
    """Row t of step k predicts token t + k + 1 (lag 1), from the target's state of token t that enters block `layers[k - 1]`.

    The pseudo state of step k is h + U_k h and stands for token t + k. It goes through the blocks from there on, attends to the text up
    to t and to the pseudo states of earlier steps, and the target's head reads it. U_k starts at 0: a copy of the state.

    Source: Wu et al. 2024, Parallel Decoding via Hidden Transfer, arXiv 2404.12022.
    """

    kind = "hidden_transfer"
    why_alone = "makes its states beside its own nodes only"
    trains_elsewhere: ClassVar[bool] = False
    lag = 1
    needs_target = True
    recomputes = True
    compiles = True
    serving = """\
No serving engine adds rows to a target's inner blocks; these figures are from the embedded evaluator.

    drafttrain eval DRAFTER --target TARGET"""

    def __init__(
        self,
        target: Target,
        *,
        layers: Sequence[int],
        train_steps: str = "in_turn",
        draft_in: str = "verifying_call",
        draft: str = "sampled",
    ) -> None:
        super().__init__()
        width = _width(target)
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in layers)
        for weight in self.maps.parameters():
            nn.init.zeros_(weight)
        self.layers = list(layers)
        self.train_steps = train_steps
        self.draft_in = draft_in
        self.rows_beside = len(self.layers) if draft_in == "verifying_call" else 0
        self.draft = draft
        self._model = (target.model,)
        self._fingerprint = target.fingerprint

    @classmethod
    def create(
        cls, settings: HiddenTransferSettings, *, target: Target | None, tokenizer: Any
    ) -> HiddenTransferDrafter:
        """Return maps that copy the state."""
        if target is None:
            raise CheckpointError(
                "drafter.kind is 'hidden_transfer' but target.model is null: its blocks and its head are the target's"
            )
        layers = layers_of(settings.layers, num_steps=settings.num_steps, num_blocks=len(blocks(target.model)))
        drafter = cls(
            target,
            layers=layers,
            train_steps=settings.train_steps,
            draft_in=settings.draft_in,
            draft=settings.draft,
        )
        return drafter.double() if target.model.dtype == torch.float64 else drafter

    @classmethod
    def why_whole_target(cls, settings: Any) -> str | None:
        """Return that it runs the target's blocks."""
        return "kind hidden_transfer runs the target's own blocks"

    @property
    def replayable(self) -> bool:
        """Not of a target with sliding windows: the forward has one mask for all layers."""
        (model,) = self._model
        return window_of(model.config.get_text_config(), name="target") is None

    @property
    def num_steps(self) -> int:
        """Draft tokens of a round."""
        return len(self.layers)

    @property
    def num_blocks(self) -> int:
        """Of the target."""
        return len(blocks(self._model[0]))

    @property
    def deepest(self) -> int:
        """One draft token for each map."""
        return self.num_steps

    def needs(self) -> TargetNeeds:
        """Return the state that enters the first map's block."""
        return TargetNeeds(hidden=(self.layers[0],))

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of every step."""
        return [RowsAsked(tuple(range(1, self.num_steps + 1)), self.lag)]

    def pseudo(self, step: int, states: Tensor) -> Tensor:
        """Return the pseudo state of a step, from 0, where the target's states are, in their type."""
        weight = self.maps[step].get_parameter("weight")
        return states + self.maps[step](states.to(weight.device, weight.dtype)).to(states.device, states.dtype)

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the target's final states of every pseudo state."""
        assert batch.target is not None, "the trainer reads what `needs` returns"
        (model,) = self._model
        if self.training:
            _check_one_mask(model, batch.tokens_BT.shape[1])
        num_steps = min(batch.num_depths or self.num_steps, self.num_steps)
        _, *states = pseudo_states(
            model,
            [self._map(step, self._trained(batch)) for step in range(num_steps)],
            self.layers[:num_steps],
            batch.target.hidden_BTD[self.layers[0]].to(model.device),
            batch.positions_BT.to(model.device),
            recompute=self.recomputing,
        )
        return DraftOutput(
            dict(enumerate(states, start=1)),
            head_of(model),
            self.lag,
            depth_weights={step + 1: float(self._trained(batch) in (None, step)) for step in range(num_steps)},
        )

    def _trained(self, batch: DraftBatch) -> int | None:
        """Return the step that is trained now, from 0; None: all are."""
        if not self.training or self.train_steps == "together" or not batch.num_steps:
            return None
        return min(batch.step * self.num_steps // batch.num_steps, self.num_steps - 1)

    def _map(self, step: int, trained: int | None) -> Callable[[Tensor], Tensor]:
        if trained in (None, step):
            return lambda states: self.pseudo(step, states)
        # Its gradient is 0, and there: every process has the gradients of all maps.
        return lambda states: _without_gradient(self.pseudo(step, states))

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the maps; the blocks are the target's."""
        self.__dict__["pseudo"] = compiled(self.pseudo)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the maps, of the blocks that the text and the pseudo states pass, and of the head.

        Blocks need the gradient of pseudo states alone. Attention among those is not counted.
        """
        (model,) = self._model
        width, stack = query_width(model.config.get_text_config()), blocks(model)
        yield matrix(parameters_of(self.maps[0]), self.num_steps * shape.positions, gradients=1)
        for number in range(self.layers[0], len(stack)):
            passing = sum(layer <= number for layer in self.layers)
            yield matrix(parameters_of(stack[number]), shape.positions, gradients=0)
            yield attention(width, shape.pairs, gradients=0)
            yield matrix(parameters_of(stack[number]), passing * shape.positions, gradients=1)
            yield attention(width, passing * shape.pairs, gradients=1)
        for depth in range(1, self.num_steps + 1):
            yield matrix(head_parameters(model), shape.rows(depth + self.lag), gradients=1)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer, which uses the target's own cache."""
        return HiddenTransferProposer(
            self, vocab_size=target.vocab_size, num_tokens=target.num_tokens, listener=listener, draft=self.draft
        )

    def save(self, folder: Path) -> None:
        """Write the maps and their blocks."""
        config = {
            "model_type": self.kind,
            "hidden_size": self.maps[0].in_features,
            "layers": self.layers,
            "train_steps": self.train_steps,
            "draft_in": self.draft_in,
            "draft": self.draft,
            "target_fingerprint": self._fingerprint,
        }
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> HiddenTransferDrafter:
        """Read the maps for the target that they were trained in.

        Raises:
            CheckpointError: The files are damaged, or the maps were trained in another target.
        """
        path = folder / "config.json"
        config, num_blocks = read_json(path), len(blocks(target.model))
        layers: Any = config.get("layers")
        if not _are_layers(layers, num_blocks=num_blocks):
            raise CheckpointError(
                f"{path}: layers must be one or more whole numbers of 1..{num_blocks}, not falling, got {layers!r:.60}"
            )
        for key, wanted in (("hidden_size", _width(target)), ("target_fingerprint", target.fingerprint)):
            if config.get(key) != wanted:
                raise CheckpointError(
                    f"{path}: {key} is {config.get(key)!r:.80}, {target.name} has {wanted!r}: use the target that it was trained in"
                )
        draft_in, draft = (
            one_of(config, key, allowed, path=path) for key, allowed in (("draft_in", DRAFT_IN), ("draft", DRAFTS))
        )
        train_steps = str(config.get("train_steps", "in_turn"))
        drafter = cls(target, layers=layers, train_steps=train_steps, draft_in=draft_in, draft=draft)
        drafter.to(target.device, getattr(torch, dtype) if isinstance(dtype, str) else dtype or target.model.dtype)
        load_into(drafter, folder / "model.safetensors")
        return drafter.eval()


def _without_gradient(states: Tensor) -> Tensor:
    return states.detach() + 0 * states


def _are_layers(layers: Any, *, num_blocks: int) -> bool:
    return (
        isinstance(layers, list)
        and bool(layers)
        and all(type(layer) is int and 1 <= layer <= num_blocks for layer in layers)
        and layers == sorted(layers)
    )


def _width(target: Target) -> int:
    return int(target.model.config.get_text_config().hidden_size)


def _check_one_mask(model: Any, num_tokens: int) -> None:
    """Check that all blocks of the target can be given one mask of a text and its pseudo states.

    Args:
        num_tokens: Of a row.

    Raises:
        CheckpointError: Its windows are shorter than the row, or its attention takes no mask.
    """
    window = window_of(model.config.get_text_config(), name="target")
    if window is not None and num_tokens > window:
        raise CheckpointError(
            f"data.max_length: rows of {num_tokens} tokens are longer than the target's sliding window of {window}, and hidden_transfer "
            f"trains with one mask for all layers: set {window} at most"
        )
    attention = model.config._attn_implementation
    if "flash" in attention:
        raise CheckpointError(
            f"target.attention: {attention} takes no mask, and the training of hidden_transfer needs one: set sdpa or eager"
        )
