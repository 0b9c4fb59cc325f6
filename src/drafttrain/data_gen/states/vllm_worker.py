"""Hidden states of texts from vLLM. Runs in vLLM's own environment without drafttrain; `in_engine.py` starts it.

The first request:

    target                  folder of the target
    dtype, max_model_len, max_num_seqs, memory_gb (of keys, values and states), tensor_parallel_size, on_cuda
    layers                  which states, ascending: the residual stream entering block i; n: after the last block

Each further request has `texts`, lists of token ids. Its answer has `texts`, in the same order: `file`, a safetensors file in the
working folder with `hidden_states` [tokens, layers, width] and `token_ids`, and `next_token`, the likeliest one.

vLLM returns hidden states by a method of speculative decoding that drafts nothing: it stores them like keys and values, and a
connector writes them to a file when a text is done.
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    # One more token than the target's positions is allowed for: the text, and the token after it, which is not read.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
CONNECTOR = "ExampleHiddenStatesConnector"


def start(request: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Start the engine and return the function from texts to the files of their states."""
    on_cuda = request["on_cuda"]
    os.environ.update(SETTINGS)
    # It takes whole gigabytes only.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(request["memory_gb"]))
    # With more threads small models are slower: 40 times with two, on a machine of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not on_cuda:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    if not on_cuda:
        _write_without_cuda()
    llm = vllm.LLM(
        model=request["target"],
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        max_num_seqs=request["max_num_seqs"],
        max_num_batched_tokens=max(request["max_model_len"], 8192),
        tensor_parallel_size=request["tensor_parallel_size"],
        enforce_eager=not on_cuda,
        # A prefix that is not computed again would have no states.
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": request["layers"]}},
        },
        kv_transfer_config={
            "kv_connector": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": os.getcwd()},
        },
        seed=0,
        # On a CPU the environment variable sets it; on a GPU the drafter needs the rest of the memory.
        **({"kv_cache_memory_bytes": int(request["memory_gb"] * 1e9)} if on_cuda else {}),
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)

    def states(asked: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": text} for text in asked["texts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        if not on_cuda:
            _finish(llm, [output.kv_transfer_params["hidden_states_path"] for output in outputs])
        return {"texts": [_written(output) for output in outputs]}

    return states


def _written(output: Any) -> dict[str, Any]:
    """Return the file of a text's states, once it is complete, and the next token."""
    import fcntl

    file = output.kv_transfer_params["hidden_states_path"]
    # vLLM holds this lock while it writes.
    with contextlib.suppress(FileNotFoundError):
        with open(f"{file}.lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.remove(f"{file}.lock")
    return {"file": file, "next_token": int(output.outputs[0].token_ids[0])}


def _finish(llm: Any, files: list[str]) -> None:
    """Run the engine until the states of finished texts are written: in this process it runs only when it is called."""
    for _ in range(len(files) + 10):
        if all(map(os.path.exists, files)):
            return
        llm.llm_engine.step()
    raise RuntimeError(f"vLLM did not write {next(file for file in files if not os.path.exists(file))}")


def _write_without_cuda() -> None:
    """Let the connector write on a CPU: 0.32.0 copies states from the device on a stream of CUDA."""
    import torch
    from safetensors.torch import save_file
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as module

    class Done:
        """Stands for a copy that is complete."""

        @staticmethod
        def query() -> bool:
            return True

    def write(self: Any, pending: Any) -> None:
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = module.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        save_file({"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}, pending.filename)
        if (lock := self._lock_fds.pop(pending.req_id, None)) is not None:
            os.close(lock)
        self._req_copy_events[pending.req_id] = Done

    getattr(module, CONNECTOR)._submit_async_write = write
