"""torch.compile for the drafter and the loss, in training steps only: validation and decoding run uncompiled.

N = rows, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import DrafttrainError
from drafttrain.core.loss_rows import LossRows
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss

BACKEND = "inductor"
SHAPES = 64
"""Shapes of a function that are compiled before torch falls back to running it uncompiled."""

Function = Callable[..., Any]


def compile_step(drafter: Drafter, loss: Loss) -> None:
    """Compile the functions that `Drafter.compile_with` lists, and the loss of a row.

    Weights keep their names, so checkpoints and resumes are unaffected.

    A size that changes from step to step becomes a symbol; rows are padded to few widths (`pipeline.data`), as on a GPU.

    Raises:
        DrafttrainError: There is no compiler for the device.
    """
    device = next(drafter.parameters()).device
    if BACKEND == "inductor":
        _check_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)

    def in_training(function: Function) -> Function:
        fast = torch.compile(function, backend=BACKEND)

        def chosen(*arguments: Any, **keywords: Any) -> Any:
            steps = drafter.training and torch.is_grad_enabled()
            return (fast if steps else function)(*arguments, **keywords)

        return chosen

    drafter.compile_with(in_training)
    loss.__dict__["per_row"] = _compiled_loss(loss.per_row)


def _compiled_loss(per_row: Callable[[LossRows], Mapping[str, Tensor]]) -> Callable[[LossRows], Mapping[str, Tensor]]:
    """Return the loss of rows as a compiled function of tensors; the number of rows is symbolic, because it varies."""

    def of_tensors(
        drafter_logits_NV: Tensor, target_logits_NV: Tensor | None, tokens_N: Tensor, seed_N: Tensor, normalised: bool
    ) -> dict[str, Tensor]:
        rows = LossRows(drafter_logits_NV, target_logits_NV, tokens_N, seed_N, target_is_normalised=normalised)
        return dict(per_row(rows))

    fast = torch.compile(of_tensors, backend=BACKEND, dynamic=True)

    def chosen(rows: LossRows) -> Mapping[str, Tensor]:
        if type(rows) is not LossRows or not torch.is_grad_enabled() or rows.seed_N is None:
            return per_row(rows)
        found: Mapping[str, Tensor] = fast(
            rows.drafter_logits_NV, rows.target_logits_NV, rows.tokens_N, rows.seed_N, rows.target_is_normalised
        )
        return found

    return chosen


def why_no_compiler(device: torch.device) -> str | None:
    """Return why torch.compile cannot run on a device; None: it can."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError):
            return "there is no C++ compiler on this machine (CXX, or g++ in the path)"
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton is not installed for this GPU (pip install triton)"


def _check_compiler(device: torch.device) -> None:
    if reason := why_no_compiler(device):
        raise DrafttrainError(f"train.compile: {reason}. Install one, or leave out train.compile")
