"""The attention and MLP sublayers of a model's blocks, and the model without some of them.

L = blocks, B = sequences, N = new tokens, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.weights import Weights
from drafttrain.target_model.anatomy import blocks, taps, trunk
from drafttrain.target_model.block_range import replaced_forwards
from drafttrain.target_model.first_neurons import neurons_left_out, run

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
FEWEST_BLOCKS = 3
"""The first and the last block always run."""


@dataclass(frozen=True)
class Skipped:
    """Sublayers that are left out, by the numbers of their blocks, ascending."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    first_neurons: int | None = None
    """Of the MLPs that run, the neurons that run; None: all."""

    @property
    def how(self) -> str:
        """How a call of the model is named, after the model."""
        return "without some sublayers" if self.first_neurons is None else "with its first neurons"

    def __len__(self) -> int:
        return len(self.attention) + len(self.mlp)

    def __str__(self) -> str:
        return f"attention of {list(self.attention)}, MLP of {list(self.mlp)}"


class Sublayers:
    """The sublayers of every block of a model.

    Raises:
        CheckpointError: The model has too few blocks, or a block whose sublayers have unknown names.
    """

    def __init__(self, model: Any) -> None:
        stack = blocks(model)
        if len(stack) < FEWEST_BLOCKS:
            raise CheckpointError(
                f"{type(model).__name__} has {len(stack)} blocks: sublayers are skipped between the first and the last one, so it needs "
                f"{FEWEST_BLOCKS} or more"
            )
        self.model = model
        self.attention = [_part(block, ATTENTION_NAMES, model, "an attention") for block in stack]
        self.mlp = [_part(block, MLP_NAMES, model, "an MLP") for block in stack]

    @property
    def num_blocks(self) -> int:
        """All blocks of the model."""
        return len(self.attention)

    @property
    def all_inner(self) -> Skipped:
        """Every sublayer that can be skipped: those of all blocks but the first and the last."""
        inner = tuple(range(1, self.num_blocks - 1))
        return Skipped(inner, inner)

    def modules(self, skipped: Skipped) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the attention modules and the MLPs of skipped sublayers."""
        return [self.attention[i] for i in skipped.attention], [self.mlp[i] for i in skipped.mlp]

    def without(self, skipped: Skipped) -> AbstractContextManager[None]:
        """Within this context the skipped sublayers add nothing to the residual stream. Their weights are not read."""
        attention, mlps = self.modules(skipped)
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        if skipped.first_neurons is not None:
            forwards = {mlp: partial(run, mlp, skipped.first_neurons) for mlp in self.mlp}
        return replaced_forwards(forwards | dict.fromkeys(attention, _no_attention) | dict.fromkeys(mlps, _no_mlp))

    def neurons_left_out(self, skipped: Skipped) -> Weights:
        """Return the weights of neurons that do not run in MLPs that do."""
        if skipped.first_neurons is None:
            return Weights()
        running = [mlp for number, mlp in enumerate(self.mlp) if number not in skipped.mlp]
        return neurons_left_out(running, [skipped.first_neurons] * len(running))

    @torch.no_grad()
    def check(self) -> None:
        """Run the model once without any inner sublayer: the last block must get what leaves the first one.

        Raises:
            CheckpointError: It gets something else: the blocks are not sums of their input, attention and MLP.
        """
        name, last = type(self.model).__name__, self.num_blocks - 1
        tokens_BN = torch.arange(3, device=self.model.get_input_embeddings().weight.device)[None]
        try:
            with self.without(self.all_inner), taps(self.model, TargetNeeds(hidden=(1, last))) as seen:
                trunk(self.model)(input_ids=tokens_BN, use_cache=False)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be run without some of its sublayers: {error}") from error
        if not torch.equal(seen[1], seen[last]):
            raise CheckpointError(
                f"{name}: a block without its attention and MLP does not return its input, so leaving them out would not only "
                "skip them. Supported are blocks that add attention and MLP to a residual stream, as Llama's"
            )


def _part(block: nn.Module, names: Sequence[str], model: Any, what: str) -> nn.Module:
    found = next((part for name in names if isinstance(part := getattr(block, name, None), nn.Module)), None)
    if found is None:
        raise CheckpointError(
            f"{type(model).__name__}: {what} was not found in its {type(block).__name__} under any of {', '.join(names)}: its sublayers "
            "cannot be skipped"
        )
    return found


def _no_attention(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


def _no_mlp(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden_states)
