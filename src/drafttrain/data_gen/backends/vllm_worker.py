"""Write texts in vLLM. Runs in vLLM's own environment without drafttrain; `in_engine.py` starts it.

The request:

    target                folder of the target
    dtype, max_model_len, max_num_seqs, memory_gb (of keys and values), on_cuda
    max_tokens            new tokens of each text
    ends                  token ids that end a text
    shards                [{file, texts: [{prompt (token ids), temperature, top_p, top_k (0: all), seed}]}]

Each shard's texts, [{tokens, finish}], are written to its file as soon as the shard is done, completely or not at all. The
answer: `version`; or `error`.
"""

import json
import math
import os
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

WHOLE_PROMPTS = {"enable_chunked_prefill": False}
"""Without this, vLLM 0.32 on a CPU ends with an error as soon as it splits the prompt of a sampled text that has a seed: it sets the
offset of a random generator, which generators of a CPU do not have."""


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Write all shards and return the answer to a request."""
    os.environ.update(SETTINGS)
    # It takes whole gigabytes only.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(request["memory_gb"]))
    # With more threads small models are slower: 40 times with two, on a machine of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import vllm

    llm = vllm.LLM(
        model=request["target"],
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        max_num_seqs=request["max_num_seqs"],
        enforce_eager=not request["on_cuda"],
        tensor_parallel_size=request["tensor_parallel_size"],
        seed=0,
        # On a CPU the environment variable sets it; on a GPU the target and the drafter need the rest of the memory.
        **({"kv_cache_memory_bytes": int(request["memory_gb"] * 1e9)} if request["on_cuda"] else WHOLE_PROMPTS),
    )
    for shard in request["shards"]:
        texts = shard["texts"]
        sampling = [
            vllm.SamplingParams(
                temperature=text["temperature"],
                top_p=text["top_p"],
                top_k=text["top_k"],
                seed=text["seed"] if text["temperature"] else None,
                max_tokens=request["max_tokens"],
                stop_token_ids=request["ends"],
                detokenize=False,
            )
            for text in texts
        ]
        prompts = [{"prompt_token_ids": text["prompt"]} for text in texts]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        written = [
            {"tokens": list(output.outputs[0].token_ids), "finish": output.outputs[0].finish_reason}
            for output in outputs
        ]
        _write(shard["file"], written)
    return {"version": vllm.__version__}


def _write(path: str, value: Any) -> None:
    """Write to a file beside it and rename that."""
    beside = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.writer.part")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(beside, path)
