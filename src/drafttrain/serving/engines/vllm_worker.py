"""Decode prompts in vLLM and count. Runs in vLLM's own environment without drafttrain; `in_engine.py` starts it.

The request:

    target               folder of the target
    speculative_config   argument of `vllm.LLM`; null: the target alone
    dtype, max_model_len
    prompts              lists of token ids, decoded one by one so that counters belong to one prompt
    max_tokens           new tokens of each prompt
    warm_up              decode the first prompt once more before
    runs                 [{temperature, seed}], each over all prompts

The answer: `version`, `repaired` (bugs of the engine that were patched for this run, in words), and for every run its `prompts`,
each with `tokens`, the counters of speculation, and its times; or `error`.
"""

import os
import time
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # With the engine in this process, errors keep their traceback, and counters can be read between prompts.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
COUNTERS = {
    "num_drafts": "vllm:spec_decode_num_drafts",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "num_accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_at": "vllm:spec_decode_num_accepted_tokens_per_pos",
}

WHOLE_PROMPTS = {"enable_chunked_prefill": False}
"""Without this, vLLM 0.32 on a CPU ends with an error where it splits the prompt of a sampled text that has a seed, here one of more
than 4,096 tokens: it sets the offset of a random generator, which generators of a CPU do not have."""


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.update(SETTINGS)
    # With more threads small models are slower: 40 times with two, on a machine of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import vllm
    from vllm.platforms import current_platform

    llm = vllm.LLM(
        model=request["target"],
        speculative_config=request["speculative_config"],
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **(WHOLE_PROMPTS if current_platform.is_cpu() else {}),
    )
    # The CPU kernels are registered when the engine is built.
    repaired = [*_repaired_temperatures(), *_repaired_context_norm()]
    prompts = list(zip(request["prompts"], request["max_tokens"], strict=True))
    if request["warm_up"]:
        _run(llm, vllm, prompts[:1], temperature=0.0, seed=0)
    runs = [_run(llm, vllm, prompts, **run) for run in request["runs"]]
    return {"version": vllm.__version__, "repaired": repaired, "runs": runs}


def _repaired_temperatures() -> list[str]:
    """Patch the temperatures of draft tokens if this build has the bug; return what was patched.

    0.32.0 gives a copy of the result's buffer to the kernel that repeats each request's temperature for its draft tokens, and so
    divides logits by uninitialized memory: with speculation and a temperature above 0 its text is not the target's.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def expanded(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
        return torch.where(x == replace_from, torch.full_like(x, replace_to), x).repeat_interleave(counts)

    example = torch.tensor([0.625, 1.75]), torch.tensor([2, 5], dtype=torch.int32), 5, 0, 1
    if torch.equal(rejection_sampler.expand_batch_to_tokens(*example), expanded(*example)):
        return []
    rejection_sampler.expand_batch_to_tokens = expanded
    return ["expand_batch_to_tokens (temperatures of draft tokens were uninitialized memory)"]


def _repaired_context_norm() -> list[str]:
    """Patch the norm of DFlash's context keys if this build has the bug; return what was patched.

    0.32.0 norms the keys of all layers in one call, with one row of weights for each layer. Its CPU kernel reads the first row for
    all of them, so a drafter of several layers drafts with other keys than it was trained with.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normed(model: Any, all_k: Any) -> Any:
        # In a buffer of its own per layer: the kernel writes to contiguous memory only.
        layers = []
        for layer_k, weight in zip(all_k, model._k_norm_weights, strict=True):
            layers.append(torch.empty_like(layer_k))
            ops.rms_norm(layers[-1], layer_k.contiguous(), weight, model._rms_norm_eps)
        return torch.stack(layers)

    example, weights = torch.ones(2, 1, 1, 32), torch.tensor([1.0, 2.0])[:, None].expand(2, 32).contiguous()
    found = torch.empty_like(example)
    ops.rms_norm(found, example, weights, 1e-6)
    if torch.allclose(found[1], 2 * found[0]):
        return []
    DFlashQwen3Model._normalize_context_k = normed
    return ["DFlashQwen3Model._normalize_context_k (context keys of all layers had the first layer's k_norm)"]


def _run(llm: Any, vllm: Any, prompts: list[tuple[list[int], int]], *, temperature: float, seed: int) -> dict[str, Any]:
    decoded = []
    for number, (prompt, max_tokens) in enumerate(prompts):
        sampling = vllm.SamplingParams(
            temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=seed + number if temperature else None
        )
        before, cpu = _counters(llm), time.process_time()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        times = {**_times(output.metrics), "cpu_seconds": time.process_time() - cpu}
        decoded.append({"tokens": list(output.outputs[0].token_ids), **_difference(before, _counters(llm)), **times})
    return {"temperature": temperature, "prompts": decoded}


def _times(metrics: Any) -> dict[str, float]:
    """Return the times of a request by the clock of the engine's core."""
    return {
        "seconds": metrics.last_token_ts - metrics.queued_ts,
        "prompt_seconds": metrics.first_token_ts - metrics.queued_ts,
    }


def _counters(llm: Any) -> dict[str, Any]:
    """Return the counters of speculation since the engine was built."""
    found = {metric.name: getattr(metric, "values", getattr(metric, "value", None)) for metric in llm.get_metrics()}
    return {ours: found[theirs] for ours, theirs in COUNTERS.items() if theirs in found}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [new - old for old, new in zip(before[name], after[name], strict=True)]
        if isinstance(after[name], list)
        else after[name] - before[name]
        for name in after
    }
