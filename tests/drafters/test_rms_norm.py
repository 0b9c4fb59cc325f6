"""The norm of EAGLE drafters: PyTorch's numbers, in the type of its input even under autocast."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from drafttrain.drafters.eagle.layer import Norm
from tests.drafters.eagle_models import eagle_drafter, eagle_target, packed


def norm(dtype: torch.dtype) -> tuple[Norm, Tensor, Tensor]:
    torch.manual_seed(0)
    made = Norm(12, eps=1e-5, dtype=dtype)
    torch.nn.init.normal_(made.weight, 1.0, 0.3)
    return made, torch.randn(3, 5, 12, dtype=dtype, requires_grad=True), torch.randn(3, 5, 12, dtype=dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.04)])
def test_numbers_and_gradients_are_those_of_rms_norm(dtype: torch.dtype, atol: float) -> None:
    made, states, gradient = norm(dtype)
    inputs = [states, made.weight]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = made(states)
    wanted = rms_norm(wide[0], (12,), wide[1], 1e-5)
    gradients = torch.autograd.grad(found, inputs, gradient)
    theirs = torch.autograd.grad(wanted, wide, gradient.double())
    for ours, plain in zip((found, *gradients), (wanted, *theirs), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=atol)


def test_a_state_of_zeros_has_finite_gradients() -> None:
    made, _, gradient = norm(torch.float32)
    states = torch.zeros(3, 5, 12, requires_grad=True)
    made(states).backward(gradient)
    assert states.grad is not None
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_under_autocast_no_float32_copy_of_the_stream_is_stored(kind: str) -> None:
    target = eagle_target()
    drafter = eagle_drafter(kind, target).float().train()
    batch, _ = packed(target, drafter, (12, 9), width=21)
    stream = batch.tokens_BT.numel() * drafter.config["hidden_size"]
    own = {p.data_ptr() for p in drafter.parameters()}
    wide: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype is torch.float32 and tensor.numel() >= stream and tensor.data_ptr() not in own:
            wide.append(tuple(tensor.shape))
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        drafted = drafter(batch)
    given = 2 if kind == "eagle" else 0
    """EAGLE-1's loss compares with the features themselves, for both signs of the difference."""
    assert len(wide) <= given * len(drafted.states_BTD), wide
