"""Flash attention of this machine's GPU against plain products, in both passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import ReadSlots
from drafttrain.target_model import packed_kernels
from drafttrain.target_model.packed_kernels import FlashOnCPU, FlashOnCUDA, Pieces
from tests.target_model.flash_numbers import flash_numbers
from tests.target_model.test_packed_attention import DOCUMENTS, positions_of, states

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("trained", [torch.arange(111), torch.tensor([3, 7, 9 + 17, 37 + 30])])
def test_the_kernel_of_a_gpu_has_the_outputs_and_gradients_of_plain_products(trained: Tensor, device: str) -> None:
    """Whole documents, and queries at the last columns alone: causal is aligned at the lower right."""
    slots = ReadSlots.of(trained, positions_of(DOCUMENTS))
    documents = slots.documents.each(lambda tensor: tensor.to(device))
    inputs = [slots.columns(x.detach().transpose(1, 2))[0] for x in states(0, torch.bfloat16)]
    query, keys, values = (x.to(device) for x in (slots.queries(inputs[0][None])[0], *inputs[1:]))
    assert packed_kernels.kernel_for(query) is (FlashOnCUDA if query.is_cuda else FlashOnCPU)
    gradient = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query)
    found = []
    for kernel, dtype in ((FlashOnCUDA, torch.bfloat16), (Pieces, torch.float64)):
        given = [x.to(dtype) for x in (query, keys, values)]
        # In a rehearsal on a CPU the operators have numbers of ours.
        with flash_numbers():
            attended, normalizer = kernel.forward(*given, documents, 0.3)
            # As of a softmax that has more in it than these columns.
            normalizer, attended = normalizer + 0.5, (attended * 0.6).to(dtype)
            gradients = kernel.backward(gradient.to(dtype), *given, attended, normalizer, documents, 0.3)
        found.append([attended, normalizer, *gradients])
    for ours_, theirs in zip(*found, strict=True):
        assert (ours_.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()
