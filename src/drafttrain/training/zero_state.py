"""State that DeepSpeed partitions, gathered by name and back, so that one checkpoint fits every layout.

A run's checkpoint is the same file whatever ZeRO stage and however many processes wrote it: weights by name, and the
optimizer's state dict as torch itself would write it. So a run can be resumed or exported under any other layout, also on a
machine without DeepSpeed. Each save gathers 12 bytes per trained parameter on the first process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.training.checkpoint_file import on_host
from drafttrain.training.optimizer import MuonAdamW, Share


def optimizer_state(engine: Any, groups: Sequence[Mapping[str, Any]], *, keep: bool) -> dict[str, Any]:
    """Return a copy of the optimizer's state dict as it would be without ZeRO; every process must call it.

    Args:
        engine: DeepSpeed's engine.
        groups: The optimizer's groups as it was built with, parameters and all.
        keep: Whether this process wants the tensors; the others only take part.
    """
    zero = engine.optimizer
    if not engine.zero_optimization():
        return dict(on_host(zero.state_dict())) if keep else {}
    inner = zero.optimizer
    _link(zero)
    state: dict[int, dict[str, Any]] = {}
    numbered: list[dict[str, Any]] = []
    for group, now, flats in zip(groups, inner.param_groups, _flat_parts(zero), strict=True):
        example: dict[str, Any] = next((inner.state[flat] for flat in flats if inner.state.get(flat)), {})
        numbers: list[int] = []
        for parameter in group["params"]:
            number = sum(len(g["params"]) for g in numbered) + len(numbers)
            numbers.append(number)
            # One step count for each parameter: an optimizer that loads this state counts in place.
            whole = {
                key: torch.tensor(float(value)) if key == "step" else _get(parameter, key)
                for key, value in example.items()
            }
            if keep and whole:
                state[number] = {key: value.cpu() for key, value in whole.items()}
        numbered.append({name: value for name, value in now.items() if name != "params"} | {"params": numbers})
    return {"state": state, "param_groups": numbered}


def load_optimizer_state(engine: Any, groups: Sequence[Mapping[str, Any]], stored: Mapping[str, Any]) -> None:
    """Partition a whole state dict over the processes for the engine; every process must call it."""
    zero = engine.optimizer
    if not engine.zero_optimization():
        zero.load_state_dict(stored)
        return
    inner = zero.optimizer
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    state = stored["state"]
    for now, then in zip(inner.param_groups, stored["param_groups"], strict=True):
        now.update({name: value for name, value in then.items() if name != "params"})
    if not state:
        return
    for flats, then in zip(_flat_parts(zero), stored["param_groups"], strict=True):
        example = state[then["params"][0]]
        for flat in flats:
            inner.state[flat] = {
                key: _as_step(inner, value, like=flat) if key == "step" else torch.zeros_like(flat.data)
                for key, value in example.items()
            }
    _link(zero)
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state[number].items():
            if key != "step":
                _set(parameter, value, key)


def give_shares(engine: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Register with Muon which parts of which matrices its flat parameters hold."""
    zero = engine.optimizer
    if not engine.zero_optimization() or not isinstance(zero.optimizer, MuonAdamW):
        return
    for group, flats in zip(groups, _flat_parts(zero), strict=True):
        if group.get("muon"):
            zero.optimizer.shares |= {
                flat: [_share(zero, parameter) for parameter in group["params"] if _is_in(zero, parameter, flat)]
                for flat in flats
            }


def load_weights(engine: Any, stored: Mapping[str, Tensor]) -> None:
    """Load whole weights and buffers into the engine's module and its master copies; every process must call it."""
    module: nn.Module = engine.module
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in stored:
            continue
        value = stored[name].to(parameter.dtype)
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if engine.global_rank == 0:
                    parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        if parameter.requires_grad and engine.zero_optimization():
            _set(parameter, value, None)
    for name, buffer in module.named_buffers():
        if name in stored:
            buffer.data.copy_(stored[name])


def weights(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return whole trained weights and buffers by name, on the CPU; every process must call it."""
    found: dict[str, Tensor] = {}
    by_id: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) not in by_id:
            value = _get(parameter, None) if hasattr(parameter, "ds_id") else parameter.data
            # Tied weights stay one tensor, also in the file.
            by_id[id(parameter)] = value.detach().to("cpu", copy=True) if keep else value.new_empty(0)
        found[name] = by_id[id(parameter)]
    if not keep:
        return {}
    kept = module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return found | {name: buffer.to("cpu", copy=True) for name, buffer in module.named_buffers() if name in kept}


def _link(zero: Any) -> None:
    """Initialize the state that maps each parameter to its part of the optimizer's state.

    ZeRO-1 and 2 do this themselves after the first step of the first group, when other groups have no state yet.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _as_step(inner: torch.optim.Optimizer, step: Any, *, like: Tensor) -> Any:
    """Return a step count in the form that the optimizer stores.

    DeepSpeed's own optimizers store a number. A fused step reads the count on the device of the parameter `like`.
    """
    if type(inner).__module__.startswith("deepspeed."):
        return int(step)
    on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
    return torch.tensor(float(step), device=like.device if on_device else "cpu")


def _flat_parts(zero: Any) -> list[list[Tensor]]:
    """Return the flat parameters of each group: one, or with ZeRO-3 one for each sub-group."""
    parts = getattr(zero, "single_partition_of_fp32_groups", None)
    if parts is not None:
        return [[part] for part in parts]
    by_group: list[list[Tensor]] = [[] for _ in zero.optimizer.param_groups]
    for number, part in enumerate(zero.fp32_partitioned_groups_flat):
        by_group[zero.sub_group_to_group_id[number]].append(part)
    return by_group


def _is_in(zero: Any, parameter: Any, flat: Tensor) -> bool:
    """Return whether a parameter belongs to one of its group's flat parameters."""
    if not hasattr(parameter, "ds_id"):
        return True
    number, _, _ = zero.grad_position[zero.get_param_id(parameter)]
    return zero.fp32_partitioned_groups_flat[number] is flat


def _share(zero: Any, parameter: Any) -> Share:
    """Return this process's part of a parameter in the optimizer's flat parameter."""
    if hasattr(parameter, "ds_id"):
        _, at, _ = zero.grad_position[zero.get_param_id(parameter)]
        first, count = _own_range(parameter)
        return Share(parameter.ds_shape, first, count, at, parameter.ds_process_group)
    mapping = parameter._hp_mapping
    if mapping is None:
        return Share(parameter.shape, 0, 0, 0, parameter._dp_group)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Share(parameter.shape, here.start, here.numel, there.start, parameter._dp_group)


def _get(parameter: Tensor, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole: Tensor = (
        safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    )
    return whole


def _set(parameter: Any, value: Tensor, key: str | None) -> None:
    """Write this process's part of a whole tensor."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(parameter.device, torch.float32)
    if hasattr(parameter, "ds_id"):
        part = _own_part(parameter, value)
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """Return ZeRO-3's part of a whole tensor on this process; the last part is padded."""
    first, count = _own_range(parameter)
    own = value.flatten().narrow(0, first, count)
    return torch.nn.functional.pad(own, (0, int(parameter.partition_numel()) - count))


def _own_range(parameter: Any) -> tuple[int, int]:
    """Return the first entry of a parameter that ZeRO-3 stores on this process, and how many it stores."""
    size, numel = int(parameter.partition_numel()), int(parameter.ds_numel)
    first = min(torch.distributed.get_rank(parameter.ds_process_group) * size, numel)
    return first, min(size, numel - first)
