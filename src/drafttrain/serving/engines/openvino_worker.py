"""Decode prompts in OpenVINO GenAI and count. Runs in its own environment without drafttrain; `in_engine.py` starts it.

The request:

    target, drafter     folders that optimum-intel wrote; drafter null: the target alone
    num_draft_tokens    draft tokens of a round
    dtype               type that it computes in
    prompts             lists of token ids, decoded one by one so that counters belong to one prompt
    max_tokens          new tokens of each prompt
    warm_up             decode the first prompt once more before

The answer: `version`, and `prompts`, each with `tokens`, the counters of speculation, and its times; or `error`. OpenVINO reports the number of
tokens of every step, and totals of draft and accepted tokens; the totals leave out a last round whose drafts were all accepted. The
counters come from the steps, and must add up to the totals.
"""

import os
import time
from typing import Any

NO_TOKEN = 2**31 - 1
"""An id that no model has."""

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import openvino_genai

    precision = PRECISIONS[request["dtype"]]
    # By default keys and values are float16, and processors with bfloat16 compute in it.
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
    }
    scheduler = openvino_genai.SchedulerConfig()
    # Results must not depend on earlier texts.
    scheduler.enable_prefix_caching = False
    drafter = {}
    if request["drafter"]:
        drafter["draft_model"] = openvino_genai.draft_model(request["drafter"], "CPU", **properties)
    pipeline = openvino_genai.LLMPipeline(request["target"], "CPU", scheduler_config=scheduler, **drafter, **properties)
    prompts = list(zip(request["prompts"], request["max_tokens"], strict=True))
    if request["warm_up"]:
        _decoded(pipeline, *prompts[0], request["num_draft_tokens"])
    decoded = [_decoded(pipeline, *prompt, request["num_draft_tokens"]) for prompt in prompts]
    return {"version": openvino_genai.__version__, "prompts": decoded}


def _decoded(pipeline: Any, prompt: list[int], max_tokens: int, num_draft_tokens: int) -> dict[str, Any]:
    import numpy
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
    # With ignore_eos a round still ends when the drafter drafts an end token: its own, if none is given here.
    config.eos_token_id, config.stop_token_ids = NO_TOKEN, {NO_TOKEN}
    if num_draft_tokens:
        config.num_assistant_tokens = num_draft_tokens
    cpu = time.process_time()
    result = pipeline.generate(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
    cpu = time.process_time() - cpu
    tokens = [int(token) for token in result.tokens[0]]
    decoded = {"tokens": tokens, **_times(result.perf_metrics), "cpu_seconds": cpu}
    if not num_draft_tokens:
        return decoded
    steps = [int(size) for size in result.perf_metrics.raw_metrics.m_batch_sizes]
    metrics = result.extended_perf_metrics
    totals = metrics.get_num_draft_tokens(), metrics.get_num_accepted_tokens()
    return decoded | counters(steps, totals, num_draft_tokens, max_tokens)


def _times(metrics: Any) -> dict[str, float]:
    """Return the times of a request as OpenVINO reports them."""
    return {
        "seconds": metrics.get_generate_duration().mean / 1000,
        "prompt_seconds": metrics.get_ttft().mean / 1000,
    }


def counters(steps: list[int], totals: tuple[int, int], num_draft_tokens: int, max_tokens: int) -> dict[str, Any]:
    """Return the counters of the rounds that drafted.

    Args:
        steps: Number of tokens of every step; the first step reads the prompt.
        totals: Draft tokens and accepted tokens, as OpenVINO counts them.

    Raises:
        RuntimeError: The steps are not a sequence of rounds, or do not add up to the totals.
    """
    rounds, written = [], steps[0]
    for size in steps[1:]:
        # OpenVINO drafts no token that could not be accepted: the last token of a text is the target's own.
        rounds.append((min(num_draft_tokens, max_tokens - written - 1), size - 1))
        written += size
    drafted, accepted = (sum(one[i] for one in rounds) for i in (0, 1))
    uncounted = rounds[-1] if rounds and rounds[-1][0] == rounds[-1][1] else (0, 0)
    fits = (drafted - uncounted[0], accepted - uncounted[1]) == totals
    if steps[0] != 1 or written != max_tokens or not fits:
        raise RuntimeError(
            f"the steps have {steps} tokens: {accepted} of {drafted} drafts accepted; OpenVINO reports {totals[1]} of {totals[0]}"
        )
    rounds = [one for one in rounds if one[0]]
    return {
        "num_drafts": len(rounds),
        "num_draft_tokens": drafted,
        "num_accepted": accepted,
        "accepted_at": [sum(count >= i for _, count in rounds) for i in range(1, num_draft_tokens + 1)],
    }
