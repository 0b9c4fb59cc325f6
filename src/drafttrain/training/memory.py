"""A training that runs out of memory: which settings to change, and how much memory that saves."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from drafttrain.core.errors import DrafttrainError
from drafttrain.core.weights import weight_bytes
from drafttrain.distributed.world import world
from drafttrain.target_model.anatomy import blocks
from drafttrain.training.distill import DistillModule
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule

OF_CPU = "can't allocate memory"
"""The message of torch's CPU allocator; CUDA raises its own error class."""


@contextmanager
def advice_on_memory(module: StepModule) -> Iterator[None]:
    """Turn torch's out-of-memory error into a list of settings to change.

    Raises:
        DrafttrainError: With the changes, the cheapest first.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and OF_CPU not in str(error):
            raise
        raise DrafttrainError(_message(module, error)) from error


def _message(module: StepModule, error: BaseException) -> str:
    device = next(module.trained.parameters()).device
    at = f"step {module.global_step + 1}" if module.trained.training else "the measurement on held-out data"
    problem = " ".join(str(error).split()) or "no memory left"
    changes = _for_steps(module, device) if module.trained.training else ["train.eval_prompts: fewer held-out prompts"]
    head = f"{world().name}: out of memory on {device.type} in {at}, {_peak(device)}: {problem}"
    return "\n  ".join([head, "What helps, the cheapest first:", *changes])


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"at most {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB allocated so far"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB resident so far"


def _for_steps(module: StepModule, device: torch.device) -> list[str]:
    settings, processes = module.settings, world().size
    changes = []
    now = settings.largest_micro_batch(processes)
    if now > 1:
        then = now // 2
        changes.append(
            f"train.records_per_device={then} (now {now}): {then} of a step's records at once in place of {now}, "
            f"{then / now:.0%} of the activations and logits; the result is the same"
        )
    if not settings.activation_checkpointing:
        changes.append(
            "train.activation_checkpointing=true: the drafter's activations are computed again, not stored; slower steps"
        )
    if isinstance(module, DistillModule):
        changes.append("data.cache, if it is none: the target is not run in a step, so it needs no activations")
        changes += _for_target(module, settings, processes)
    changes += _for_states(module, settings, device, processes)
    return [*changes, "data.max_length: activations shrink with it; this changes the training data"]


def _for_target(module: DistillModule, settings: TrainSettings, processes: int) -> list[str]:
    """Return the changes that free the memory of the target's blocks."""
    if module.target is None or settings.target_placement != "replicated":
        return []
    size = weight_bytes(blocks(module.target.model)) / 1e9
    changes = [f"train.target_placement=absent, with a data.cache: {size:.2f} GB of the target's blocks are not loaded"]
    if processes > 1:
        changes.append(
            f"train.target_placement=sharded: of these {size:.2f} GB each process holds {size / processes:.2f} GB; slower steps"
        )
    return changes


def _for_states(module: StepModule, settings: TrainSettings, device: torch.device, processes: int) -> list[str]:
    """Return the changes that move or partition gradients and the optimizer's two moments in float32."""
    if settings.optimizer != "adamw":
        return []
    trained = sum(p.numel() for p in module.trained.parameters() if p.requires_grad)
    states = 8 * trained / 1e9
    changes = []
    if processes > 1 and settings.zero_stage < 2:
        changes.append(
            f"train.deepspeed={{stage: 2}} (now {settings.zero_stage}): optimizer states and gradients, {1.5 * states:.2f} GB, "
            f"are spread over {processes} processes"
        )
    if device.type == "cuda" and not (settings.deepspeed and settings.deepspeed.offloads):
        stage = max(2, settings.zero_stage)
        changes.append(
            f"train.deepspeed={{stage: {stage}, offload_optimizer: cpu}}: {states:.2f} GB of optimizer states leave the device"
        )
    return changes
