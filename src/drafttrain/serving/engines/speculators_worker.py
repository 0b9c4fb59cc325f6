"""Compute the logits of a drafter with the speculators library. Runs without drafttrain; `in_engine.py` starts it.

The request:

    folder       a drafter in the library's format
    asked        safetensors file with `features` of one row, and `tokens` that the first step embeds
    answered     safetensors file to write: `logits.0`, `logits.1`, ..., one for each step
    num_steps    number of steps of its training-time rollout

The answer: `version`; or `error`.
"""

import os
from importlib.metadata import version
from typing import Any

SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.update(SETTINGS)
    import torch
    from safetensors.torch import load_file, save_file
    from speculators.models.eagle3 import Eagle3DraftModel

    torch.set_num_threads(1)
    held = load_file(request["asked"])
    model = Eagle3DraftModel.from_pretrained(request["folder"]).to(held["features"].dtype).eval()
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda *hooked: logits.append(hooked[2]))
    with torch.no_grad():
        model(
            hidden_states=held["features"],
            input_ids=held["tokens"],
            document_ids=torch.zeros_like(held["tokens"]),
            ttt_steps=request["num_steps"],
        )
    save_file({f"logits.{step}": one.contiguous() for step, one in enumerate(logits)}, request["answered"])
    return {"version": version("speculators")}
