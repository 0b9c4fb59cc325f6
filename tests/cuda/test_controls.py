"""What the suite must report: planted faults, each seen to be found; and what CUDA does allow, which it must not report."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests.cuda.happenings import Happenings

pytestmark = pytest.mark.pretended_cuda


def test_numbers_are_those_of_the_cpu() -> None:
    weight = torch.randn(4, 3, device="cuda", requires_grad=True)
    (weight @ torch.ones(3, device="cuda:0")).square().sum().backward()
    assert weight.grad is not None
    assert weight.is_cuda
    assert str(weight.grad.device) == "cuda:0"
    on_cpu = weight.detach().cpu().requires_grad_()
    (on_cpu @ torch.ones(3)).square().sum().backward()
    torch.testing.assert_close(weight.grad.cpu(), on_cpu.grad)


def on(device: str, *shape: int) -> Tensor:
    return torch.ones(*shape, device=device)


REFUSED = {
    "a mask of the CPU": lambda: on("cuda", 3).masked_fill(torch.zeros(3, dtype=torch.bool), 0.0),
    "a sum of two devices": lambda: on("cuda", 3) + on("cpu", 3),
    "a sum of two GPUs": lambda: on("cuda:0", 3) + on("cuda:1", 3),
    "one number of the other GPU": lambda: on("cuda:0", 3) + on("cuda:1", 3).sum(),
    "numbers of two devices in one stack": lambda: torch.stack([on("cuda", 3).sum(), on("cpu", 3).sum()]),
    "rows of the CPU by an index of the GPU": lambda: on("cpu", 3)[torch.zeros(2, dtype=torch.long, device="cuda")],
    "gathered by an index of the CPU": lambda: on("cuda", 3).gather(0, torch.zeros(2, dtype=torch.long)),
    "embedded tokens of the CPU": lambda: torch.nn.functional.embedding(
        torch.zeros(2, dtype=torch.long), on("cuda", 3, 2)
    ),
    "into the CPU in place": lambda: on("cpu", 3).add_(on("cuda", 3).sum()),
    "a scaled list by a number of the CPU": lambda: torch._foreach_mul([on("cuda", 3)], torch.tensor(2.0)),
    "a generator of the CPU": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a product of integers": lambda: on("cuda", 3, 3).long() @ on("cuda", 3, 3).long(),
    "numpy": lambda: on("cuda", 3).numpy(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_control_what_cuda_refuses_is_refused_and_stays_recorded(what: str, cuda: Happenings) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what]()
    assert sum(cuda.refusals.values()) == 1
    with pytest.raises(AssertionError, match=r"test_controls.py:\d+"):
        cuda.require_no_refusal()
    cuda.clear()


ALLOWED = {
    "a number of the CPU": lambda: on("cuda", 3) * torch.tensor(2.0),
    "an index of the CPU": lambda: on("cuda", 3)[torch.tensor([0, 1])],
    "a value put in place": lambda: on("cuda", 3).index_put_((torch.tensor([0]),), torch.tensor(2.0)),
    "a filled mask": lambda: on("cuda", 3).masked_fill(on("cuda", 3) > 0, torch.tensor(1.0)),
    "where": lambda: torch.where(on("cuda", 3) > 0, on("cuda", 3), torch.tensor(0.0)),
    "to the other GPU": lambda: on("cuda:0", 3).to("cuda:1") + on("cuda:1", 3),
    "made like another": lambda: on("cuda:1", 3) + on("cuda:1", 3).new_tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_cuda_allows_is_not_refused(what: str) -> None:
    ALLOWED[what]()


WAITS = {
    "item": (lambda x: x.sum().item(), 1, 0),
    "float": (lambda x: float(x.sum()), 1, 0),
    "bool": (lambda x: bool(x.any()), 1, 0),
    "list": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "cpu later": (lambda x: x.to("cpu", non_blocking=True), 0, 0),
    "nonzero": (lambda x: x.nonzero(), 1, 0),
    "boolean index": (lambda x: x[x > 0], 1, 0),
    "assigned by a mask": (lambda x: x.__setitem__(x > 0, 0.0), 0, 0),
    "repeated": (lambda x: x.repeat_interleave(x.long()), 1, 0),
    "repeated to a known size": (lambda x: x.repeat_interleave(x.long(), output_size=3), 0, 0),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1, 0),
    "an event": (lambda x: torch.cuda.Event().synchronize(), 1, 0),
    "made of a list": (lambda x: torch.tensor([1, 2], device="cuda"), 0, 1),
    "sent": (lambda x: torch.ones(3).to("cuda"), 0, 1),
    "sent without waiting": (lambda x: torch.ones(3).to("cuda", non_blocking=True), 0, 1),
    "sent out of pinned memory": (lambda x: torch.ones(3).pin_memory().to("cuda"), 1, 0),
    "sent out of pinned memory without waiting": (
        lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        0,
        0,
    ),
    "an index of the CPU": (lambda x: x[torch.tensor([0])], 0, 1),
    "arithmetic": (lambda x: (2 * x + 1).softmax(0).cumsum(0), 0, 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_control_where_the_host_waits_is_counted(what: str, cuda: Happenings) -> None:
    do, waits, copies = WAITS[what]
    x = torch.ones(3, device="cuda")
    cuda.clear()
    do(x)
    assert (cuda.num_waits, cuda.num_copies) == (waits, copies), cuda.report()


def test_threads_have_the_devices_too() -> None:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(3).to("cuda")))
    thread.start()
    thread.join()
    assert made[0].is_cuda


def test_autocast_is_that_of_cuda() -> None:
    """It computes norms in float32, which the CPU's does not."""
    with torch.autocast("cuda", torch.bfloat16):
        x = torch.nn.functional.linear(torch.ones(2, 4, device="cuda"), torch.ones(4, 4, device="cuda"))
        assert x.dtype == torch.bfloat16
        assert torch.nn.functional.rms_norm(x, (4,)).dtype == torch.float32
