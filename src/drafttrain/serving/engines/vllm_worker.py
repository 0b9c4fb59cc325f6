"""Decode prompts in vLLM and count. Runs in vLLM's own environment, without drafttrain: `in_engine.py` runs it.

The request:

    target               folder of the target
    speculative_config   what `LLM(speculative_config=...)` takes; null: the target alone
    dtype, max_model_len
    prompts              lists of token ids; decoded one by one, so that the counters are those of one prompt
    runs                 [{temperature, max_tokens, seed}], over all prompts each

The answer: `version`, `repaired` (what of the engine was mended to ask it at all, in words), and for every run its `prompts`,
each with `tokens` and the counters of speculation; or `error`.
"""

import os
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine in this process: errors keep their traceback, and the counters are read between prompts.
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


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.update(SETTINGS)
    # Small models wait for their threads: 40 times as long with two, on a machine of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import vllm

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
    )
    # Its CPU kernels are in place once the engine is.
    repaired = _repaired()
    runs = [_run(llm, vllm, request["prompts"], **run) for run in request["runs"]]
    return {"version": vllm.__version__, "repaired": repaired, "runs": runs}


def _repaired() -> list[str]:
    """Mend what is broken in the engine's CPU build, where it is; return what was done.

    0.32.0 hands a copy of its result's buffer to the kernel that repeats each request's temperature for its draft tokens, and so
    divides logits by memory that nobody wrote: with speculation and a temperature above 0 its text is not the target's.
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
    return ["expand_batch_to_tokens (temperatures of draft tokens were memory that nobody wrote)"]


def _run(
    llm: Any, vllm: Any, prompts: list[list[int]], *, temperature: float, max_tokens: int, seed: int
) -> dict[str, Any]:
    decoded = []
    for number, prompt in enumerate(prompts):
        sampling = vllm.SamplingParams(
            temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=seed + number if temperature else None
        )
        before = _counters(llm)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        decoded.append({"tokens": list(output.outputs[0].token_ids), **_difference(before, _counters(llm))})
    return {"temperature": temperature, "prompts": decoded}


def _counters(llm: Any) -> dict[str, Any]:
    """Return the counters of speculation so far; the engine adds up for as long as it lives."""
    found = {metric.name: getattr(metric, "values", getattr(metric, "value", None)) for metric in llm.get_metrics()}
    return {ours: found[theirs] for ours, theirs in COUNTERS.items() if theirs in found}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [new - old for old, new in zip(before[name], after[name], strict=True)]
        if isinstance(after[name], list)
        else after[name] - before[name]
        for name in after
    }
