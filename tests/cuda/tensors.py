"""Tensors that claim to be on cuda:N: every operation on them is looked at, then done with their numbers on the CPU.

Their dispatch keys are CUDA's, so autograd and autocast do with them what they do there; this is asked below both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda import preload, waits
from tests.cuda.happenings import happenings, note
from tests.cuda.operands import mapped, tensors_in
from tests.cuda.refusals import refusal

ABSENT = object()
MATH = 0
"""The attention that is plain arithmetic: no fused kernel takes these tensors."""


def _add_wide_product(
    added: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor, **factors: Any
) -> Tensor:
    assert left.dtype == right.dtype in (torch.bfloat16, torch.float16), "CUDA widens products of half types alone"
    assert added.dtype == out.dtype == out_dtype == torch.float32, "CUDA widens to float32 alone"
    return torch.addmm(added, left.to(out_dtype), right.to(out_dtype), out=out, **factors)


ON_CUDA_ALONE: dict[Any, Callable[..., Any]] = {torch.ops.aten.addmm.dtype_out: _add_wide_product}
"""Operations that a CPU lacks, and what they compute."""

pinned: dict[int, Tensor] = {}
"""Memory of the host that is pinned, by its address; held so that no other gets the same."""

of_namespace: dict[str, Callable[..., Any]] = {}
"""What does the operations of other namespaces than aten's."""


class Pretended(Tensor):
    """A tensor on cuda:N whose numbers are on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=device,
            requires_grad=False,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(func, args, dict(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.numbers!r} on {self.device}"

    # What torch does in C++ with the memory itself.

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        what = f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first"
        note(happenings.refusals, what)
        raise TypeError(what)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        """Every stream is done at once."""

    def pin_memory(self, device: Any = None) -> Any:
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            made: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        else:
            made.requires_grad_(self.requires_grad)
        memo[id(self)] = made
        return made


class PretendedCuda(TorchDispatchMode):
    """Catches what makes the first tensors on a device, out of nothing or out of the CPU's."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What torch would wrap around every operation for torch.compile takes as long as the operation.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(func, args, dict(kwargs or {}))


@cache
def _names(func: Any) -> tuple[str, str]:
    namespace, _, name = func._schema.name.partition("::")
    return namespace, name


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do one operation, as CUDA would."""
    namespace, name = _names(func)
    operands = tensors_in((*args, *kwargs.values()))
    held = [one for one in operands if isinstance(one, Pretended)]
    if namespace in of_namespace:
        return of_namespace[namespace](func, name, args, kwargs)
    wanted = kwargs.get("device")
    given = wanted is not None
    out = numbered(wanted) if given else held[0].device if held else None
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
        return pin(func(*args, **kwargs))
    if out is not None and out.type != "cuda":
        out = None
    if not held and out is None:
        return func(*args, **kwargs)
    if given:
        kwargs["device"] = out or wanted
    if refused := refusal(func, name, args, kwargs, operands, out):
        note(happenings.refusals, refused)
        raise RuntimeError(refused)
    waits.count(name, args, kwargs, pinned=is_pinned)
    if given and out is not None:
        kwargs["device"] = torch.device("cpu")
    return _done(func, name, args, kwargs, held, out)


def _done(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    held: list[Pretended],
    out: torch.device | None,
) -> Any:
    """Do it with the numbers, and put the results where they belong."""
    if name == "_fused_sdp_choice":
        return MATH
    result = ON_CUDA_ALONE.get(func, func)(*mapped(_numbers, args), **mapped(_numbers, kwargs))
    if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
        assert args[0].shape == _numbers(args[0]).shape, f"{name} changes the shape in place: not pretended"
        return args[0]
    known = {id(one.numbers): one for one in held}

    def placed(one: Tensor) -> Tensor:
        return known[id(one)] if id(one) in known else Pretended(one, out)

    return result if out is None else mapped(placed, result)


def _numbers(one: Any) -> Any:
    return one.numbers if isinstance(one, Pretended) else one


def numbered(device: Any) -> torch.device:
    """Return the device with its number: plain `cuda` is the one that is current."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", preload.current_device())
    return device


def pin(tensor: Tensor) -> Tensor:
    """Return the tensor in memory that is pinned."""
    if not is_pinned(tensor):
        tensor = tensor.clone()
        pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a tensor of the CPU is in memory that is pinned."""
    return not isinstance(tensor, Pretended) and tensor.untyped_storage().data_ptr() in pinned
