"""Compares the shapes of the weights in a model folder with its configuration. Only headers are read."""

from __future__ import annotations

from pathlib import Path

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import shapes_in


def refuse_wrong_shapes(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder whose weights do not have the shapes of its config.json. Other problems are left to the caller.

    Raises:
        CheckpointError: Lists the first of them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        held = shapes_in(folder)
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        # The caller has an error of its own to report.
        return
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in held if name in wanted and held[name] != wanted[name]]
    if wrong:
        shown = "; ".join(f"{name}: shape {held[name]}, must be {wanted[name]}" for name in wrong[:3])
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights do not have the shapes that config.json implies: {shown}"
        )
