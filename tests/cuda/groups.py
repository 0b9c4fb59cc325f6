"""Process groups that serve the devices alone, as NCCL's do: a tensor of the CPU is refused, by torch's own check.

A group of backend nccl is one of gloo bound to cuda. What is on a pretended device goes, by its numbers, over a second group beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from tests.cuda import tensors
from tests.cuda.happenings import happenings, note
from tests.cuda.operands import tensors_in

BOUND = "cuda:gloo"

_beside: dict[str, dist.ProcessGroup] = {}
"""By the name of a group: the one that carries the numbers of its devices."""

_init, _new_group, _barrier, _get_backend = dist.init_process_group, dist.new_group, dist.barrier, dist.get_backend


def _is_of_devices(backend: Any) -> bool:
    return backend is not None and ("nccl" in str(backend) or str(backend) == BOUND)


def _carried(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> None:
    _beside[group.group_name] = _new_group(*args, **kwargs, backend="gloo")


def _init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
    if not _is_of_devices(backend):
        _init(backend, *args, **kwargs)
        return
    kwargs.pop("device_id", None)
    _init(BOUND, *args, **kwargs)
    assert dist.group.WORLD is not None
    _carried(dist.group.WORLD)


def _grouped(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
    if backend is None and dist.group.WORLD is not None and dist.group.WORLD.group_name in _beside:
        backend = BOUND
    if not _is_of_devices(backend):
        return _new_group(ranks, timeout, backend, **kwargs)
    made = _new_group(ranks, timeout, BOUND)
    beside = _new_group(ranks, timeout, "gloo")
    if isinstance(made, dist.ProcessGroup):
        _beside[made.group_name] = beside
    return made


def _waited(group: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Wait for all; NCCL's host waits for the device that waits."""
    group = group or dist.group.WORLD
    if group.group_name not in _beside:
        return _barrier(group, *args, **kwargs)
    note(happenings.waits, "barrier")
    return _barrier(_beside[group.group_name])


def _named(group: Any = None) -> str:
    backend = str(_get_backend(group))
    return "nccl" if backend == BOUND else backend


def _collective(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do a collective with the numbers."""

    def beside(one: Any) -> Any:
        if isinstance(one, tensors.Pretended):
            return one.numbers
        if isinstance(one, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(one)
            except (RuntimeError, TypeError):
                return one
            return _beside[group.group_name].boxed()
        return one

    held = {id(one.numbers): one for one in _pretended(args, kwargs)}
    result = func(*tree_map(beside, args), **tree_map(beside, kwargs))
    return tree_map(lambda one: held.get(id(one), one), result)


def _pretended(args: Sequence[Any], kwargs: dict[str, Any]) -> list[tensors.Pretended]:
    return [one for one in tensors_in((*args, *kwargs.values())) if isinstance(one, tensors.Pretended)]


def _of_c10d(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if _pretended(args, kwargs):
        return _collective(func, name, args, kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        # Recorded too: Lightning or whoever calls might catch it.
        note(happenings.refusals, str(error))
        raise


@contextmanager
def groups_of_devices() -> Iterator[None]:
    """Have NCCL, as far as its groups go, inside the block."""
    with ExitStack() as stack:
        for name, instead in (
            ("init_process_group", _init_process_group),
            ("new_group", _grouped),
            ("barrier", _waited),
            ("get_backend", _named),
        ):
            stack.enter_context(mock.patch.object(dist, name, instead))
            stack.enter_context(mock.patch.object(dist.distributed_c10d, name, instead))
        stack.enter_context(mock.patch.object(dist, "is_nccl_available", return_value=True))
        stack.enter_context(mock.patch.dict(tensors.of_namespace, {"c10d": _of_c10d}))
        yield
