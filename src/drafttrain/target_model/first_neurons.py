"""Feed-forward blocks with their first neurons only, as nested widths have them.

B = sequences, T = positions, D = hidden, F = neurons
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from drafttrain.core.errors import CheckpointError
from drafttrain.core.weights import Weights, weights_of
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.block_range import replaced_forwards
from drafttrain.target_model.number_type import refuse_quantized

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def gated_mlps(model: Any) -> list[Any]:
    """Return the feed-forward block of every decoder block: down(act(gate) * up).

    Raises:
        CheckpointError: Some block has another one, or its weights are quantized.
    """
    refuse_quantized(model, "first feed-forward neurons")
    found = [getattr(block, "mlp", None) for block in blocks(model)]
    if not all(hasattr(mlp, name) for mlp in found for name in PARTS):
        raise CheckpointError(_unlike(model))
    return found


@torch.no_grad()
def check_gated(model: Any) -> None:
    """Run every feed-forward block as it is, and as all of its first neurons.

    Raises:
        CheckpointError: They differ.
    """
    for mlp in gated_mlps(model):
        weight, width = mlp.gate_proj.weight, mlp.gate_proj.out_features
        states_11D = torch.linspace(-1, 1, mlp.gate_proj.in_features).to(weight)[None, None]
        own, found = mlp(states_11D), run(mlp, width, states_11D)
        if not (own - found).norm() <= 1e-2 * own.norm():
            raise CheckpointError(_unlike(model))


def _unlike(model: Any) -> str:
    return (
        f"{type(model).__name__}: a block has no feed-forward block `mlp` that computes down_proj(act_fn(gate_proj) * up_proj), as Llama "
        "has, so its first neurons cannot run alone"
    )


def neurons_at(mlps: Sequence[Any], share: float) -> list[int]:
    """Return a share of the neurons of each feed-forward block.

    Raises:
        CheckpointError: It is not a whole number of them.
    """
    whole = [int(mlp.gate_proj.out_features) for mlp in mlps]
    for problem in filter(None, (share_problem(share, width) for width in whole)):
        raise CheckpointError(problem)
    return [round(share * width) for width in whole]


def share_problem(share: float, width: int) -> str | None:
    """Return why a share of so many neurons cannot run alone; None: it can."""
    own = round(share * width)
    if own and abs(share * width - own) < 1e-6:
        return None
    return f"{share:g} of {width} feed-forward neurons is not a whole number: choose another share"


def with_first_neurons(mlps: Sequence[nn.Module], widths: Sequence[int]) -> AbstractContextManager[None]:
    """Within this context each of these feed-forward blocks runs its first neurons only.

    The weights are read, not called: gradients of the neurons that do not run are exactly 0.
    """
    return replaced_forwards({mlp: partial(run, mlp, width) for mlp, width in zip(mlps, widths, strict=True)})


def run(mlp: Any, width: int, hidden_states: Tensor) -> Tensor:
    """Return the output of the first `width` neurons, added_BTD.

    Source: Devvrit et al. 2023, MatFormer, arXiv 2310.07707, 3.1: FFN_i(x) = act(x W1[:m]) W2[:m].
    """
    gate_BTF, up_BTF = (_rows(one, width, hidden_states) for one in (mlp.gate_proj, mlp.up_proj))
    return linear(mlp.act_fn(gate_BTF) * up_BTF, mlp.down_proj.weight[:, :width], mlp.down_proj.bias)


def neurons_left_out(mlps: Sequence[Any], widths: Sequence[int]) -> Weights:
    """Return the weights of the neurons that do not run."""
    total = Weights()
    for mlp, width in zip(mlps, widths, strict=True):
        whole, share = weights_of(mlp), 1 - width / mlp.gate_proj.out_features
        total += Weights(round(whole.num_bytes * share), round(whole.multiplications * share))
    return total


def _rows(layer: Any, width: int, states_BTD: Tensor) -> Tensor:
    return linear(states_BTD, layer.weight[:width], None if layer.bias is None else layer.bias[:width])
