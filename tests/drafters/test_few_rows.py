"""Products with prepared weights give the numbers of the layers that they are made of."""

import pytest
import torch
from torch import nn

from drafttrain.drafters.few_rows import head_product, product_with
from drafttrain.target_model.logits import head_logits
from tests.conftest import random_llama


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_a_product_has_the_outputs_of_its_layers_in_order(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(48, outputs, bias=bias).to(dtype) for outputs in (32, 16)]
    inputs = torch.randn(2, 3, 48, dtype=dtype)
    with torch.no_grad():
        found, wanted = product_with(layers)(inputs), torch.cat([layer(inputs) for layer in layers], dim=-1)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        swapped = product_with(layers[::-1])(inputs)
    assert (swapped - wanted).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_targets_head(dtype: torch.dtype) -> None:
    model = random_llama(num_layers=1, vocab_size=40, hidden_size=32).to(dtype)
    states = torch.randn(3, 32, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(head_product(model)(states), head_logits(model, states), rtol=1e-2, atol=1e-3)
