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
from drafttrain.training.step_module import StepModule
from drafttrain.training.what_helps import what_helps

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
    blocks_bytes = None
    if isinstance(module, DistillModule):
        blocks_bytes = weight_bytes(blocks(module.target.model)) if module.target is not None else 0
    return what_helps(
        module.settings,
        processes=world().size,
        trained=sum(p.numel() for p in module.trained.parameters() if p.requires_grad),
        recomputes=getattr(module.trained, "recomputes", False),
        blocks_bytes=blocks_bytes,
        device_type=device.type,
    )
