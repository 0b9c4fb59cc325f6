"""The residual blocks of a Medusa head.

D = hidden, N = rows
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class ResidualBlocks(nn.Module):
    """Residual blocks x + SiLU(W x + b). They start as the identity."""

    def __init__(self, hidden_size: int, num_layers: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            uninitialized_linear(hidden_size, hidden_size, bias=True, device=device) for _ in range(num_layers)
        )
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states_ND: Tensor) -> Tensor:
        for layer in self.layers:
            states_ND = states_ND + silu(layer(states_ND))
        return states_ND


def uninitialized_linear(num_inputs: int, num_outputs: int, *, bias: bool, device: torch.device | str) -> nn.Linear:
    """Return a linear layer with uninitialized weights: drawing half a billion random numbers first takes seconds.

    Like torch's `skip_init`, but it also works with fake tensors (`train.step_cost`).
    """
    made = nn.Linear(num_inputs, num_outputs, bias=bias, device="meta")
    for name, weight in list(made.named_parameters()):
        setattr(made, name, nn.Parameter(torch.empty_like(weight, device=device)))
    return made
