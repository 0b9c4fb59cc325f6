"""Hidden states of texts from plain transformers, a text at a time: a worker of the protocol of vllm_worker.py without vLLM.

The file `faults` of the first request, if it exists, has a number: the states of that many layers above are returned.
"""

import os
from collections.abc import Callable
from typing import Any


def start(request: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the model and return the function from texts to the files of their states."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(request["target"], dtype=getattr(torch, request["dtype"])).eval()
    entered: list[Any] = []
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_pre_hook(lambda _, given: entered.append(given[0][0]))
    number = 0

    def states(asked: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        found = []
        shift = 0
        if os.path.exists(request["faults"]):
            with open(request["faults"], encoding="utf-8") as faults:
                shift = int(faults.read())
        for text in asked["texts"]:
            entered.clear()
            with torch.no_grad():
                logits = model(torch.tensor([text]), use_cache=False).logits
            chosen = [entered[(layer + shift) % len(entered)] for layer in request["layers"]]
            tensors = {"hidden_states": torch.stack(chosen, dim=1), "token_ids": torch.tensor(text)}
            number += 1
            save_file(tensors, f"{number}.safetensors")
            found.append({"file": f"{number}.safetensors", "next_token": int(logits[0, -1].argmax())})
        return {"texts": found}

    return states
