"""`torch.cuda` of a machine with one or two GPUs: what is asked of it is answered, what waits is counted."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # its table of functions holds those that are replaced below: read before they are

from tests.cuda import preload, tensors
from tests.cuda.happenings import happenings, note
from tests.cuda.tensors import PretendedCuda

GIB = 2**30


class Stream:
    """All work is done when it is asked for, so a stream has nothing to do but to be waited for."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = tensors.numbered("cuda" if device is None else device)
        self.device_index = self.device.index
        self.cuda_stream = self.stream_id = id(self)

    def synchronize(self) -> None:
        """Wait."""
        note(happenings.waits, "stream.synchronize")

    def record_event(self, event: Any = None) -> Any:
        """Return an event that is recorded here."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Return that all is done."""
        return True

    def wait_stream(self, stream: Any) -> None:
        """The device waits, the host does not."""

    def wait_event(self, event: Any) -> None:
        """The device waits, the host does not."""

    def __enter__(self) -> Stream:
        _streams.current.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _streams.current.pop()


class Event:
    """A moment; the time between two is the host's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        """Keep this moment."""
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """The device waits, the host does not."""

    def query(self) -> bool:
        """Return that it has passed."""
        return True

    def synchronize(self) -> None:
        """Wait."""
        note(happenings.waits, "event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        """Return the milliseconds from here to a later event."""
        return 1e3 * (other.at - self.at)


class _Streams(threading.local):
    """The streams that were entered in this thread."""

    def __init__(self) -> None:
        self.current: list[Stream] = []


_streams = _Streams()


def _current_stream(device: Any = None) -> Stream:
    return _streams.current[-1] if _streams.current else Stream(device)


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with stream:
        yield


def _exchange(index: int) -> int:
    before = preload.current_device()
    if index >= 0:
        preload.set_device(index)
    return before


def _set_device(device: Any) -> None:
    index = tensors.numbered(device).index
    if index >= torch.cuda.device_count():
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")  # as one that shows a rank its own GPU alone
    if index >= 0:
        preload.set_device(index)


def _synchronize(device: Any = None) -> None:
    note(happenings.waits, "cuda.synchronize")


def _swap(one: Any, other: Any) -> None:
    """Exchange what two tensors hold; each stays the object that others know, with their marks on it, as where `.to` is on CUDA."""
    if one is other:
        return
    is_parameter = isinstance(one, torch.nn.Parameter)
    numbers = [vars(tensor).pop("numbers", None) for tensor in (one, other)]
    one.__class__, other.__class__ = other.__class__, one.__class__
    for tensor, held in zip((other, one), numbers, strict=True):
        if held is not None:
            tensor.numbers = held
            # How torch marks a parameter of a class that is not Parameter.
            tensor._is_param = is_parameter
    torch._C._swap_tensor_impl(one, other)


_data: Any = torch._C.TensorBase.data


def _set_data(tensor: Any, other: torch.Tensor) -> None:
    """Give a tensor the memory of another, which may be elsewhere: ZeRO-3 gathers parameters so."""
    if isinstance(tensor, tensors.Pretended) == isinstance(other, tensors.Pretended):
        _data.__set__(tensor, other)
        if isinstance(other, tensors.Pretended):
            tensor.numbers = other.numbers
        return
    wants_grad = tensor.requires_grad
    _swap(tensor, other.detach())
    tensor.requires_grad_(wants_grad)


ANSWERS: dict[str, Any] = {
    **dict.fromkeys(("is_initialized", "is_available", "is_bf16_supported", "can_device_access_peer"), True),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
    **dict.fromkeys(("_lazy_init", "init", "reset_peak_memory_stats", "empty_cache", "ipc_collect", "set_stream")),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all")),
    "get_device_capability": (9, 0),
    "get_device_name": "pretended",
    "get_device_properties": types.SimpleNamespace(
        name="pretended", major=9, minor=0, total_memory=80 * GIB, multi_processor_count=132, uuid="0"
    ),
    "get_arch_list": ["sm_90"],
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": [],
    "is_current_stream_capturing": False,
    "mem_get_info": (79 * GIB, 80 * GIB),
    "memory_stats": {},
}
"""What the functions of `torch.cuda` return, whatever they are given."""


def _returns(value: Any) -> Callable[..., Any]:
    # A function of its own each time: torch.compile keeps a table of these functions by what they are.
    return lambda *_, **__: value


def _of_torch_cuda(num_devices: int) -> dict[str, Any]:
    """Return what replaces the members of `torch.cuda`."""
    return {
        **{name: _returns(value) for name, value in ANSWERS.items()},
        "device_count": _returns(num_devices),
        "current_device": lambda: preload.current_device(),
        "set_device": _set_device,
        "_exchange_device": _exchange,
        "_maybe_exchange_device": lambda index: _exchange(index),
        "Stream": Stream,
        "Event": Event,
        "stream": _stream,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: Stream(device),
        "synchronize": _synchronize,
    }


@contextmanager
def gpus(num_devices: int = 1) -> Iterator[None]:
    """Have so many GPUs inside the block, in all threads that are started there."""
    assert preload.loaded_guard is not None, "the guard is loaded before torch: python -m pytest -p tests.cuda.plugin"
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def in_mode(thread: threading.Thread) -> None:
        with PretendedCuda():
            begin(thread)

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, instead in _of_torch_cuda(num_devices).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, instead))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", return_value=(2, 27, 0)))
        for name in ("range_push", "range_pop", "mark"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", _synchronize))
        stack.enter_context(mock.patch.object(torch.accelerator, "device_count", return_value=num_devices))
        stack.enter_context(mock.patch.object(threading.Thread, "_bootstrap_inner", in_mode))
        stack.enter_context(
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensors.pin(tensor))
        )
        stack.enter_context(
            mock.patch.object(torch.Tensor, "is_pinned", lambda tensor, device=None: tensors.is_pinned(tensor))
        )
        # A module moves by swapping its parameters: their class changes with their device.
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap))
        data = property(lambda tensor: tensor.detach(), _set_data)
        stack.enter_context(mock.patch.object(torch.Tensor, "data", data, create=True))
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        # `torch.tensor(..., device="cuda")` is made on the CPU, then copied, as it is on CUDA.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        preload.set_device(0)
        stack.enter_context(PretendedCuda())
        yield
