"""Decode prompts in OpenVINO GenAI and count. Runs in its own environment, without drafttrain: `in_engine.py` runs it.

The request:

    target, drafter     folders that optimum-intel wrote; drafter null: the target alone
    num_draft_tokens    of a round
    dtype               that it computes in
    prompts             lists of token ids; decoded one by one, so that the counters are those of one prompt
    max_tokens          new tokens of each

The answer: `version`, and `prompts`, each with `tokens` and the counters of speculation; or `error`. OpenVINO gives the tokens of every
step, and totals of draft and accepted tokens; the totals leave out a round that ends the text with all of its drafts kept. Counted is
what the steps gave, and it must add up to the totals.
"""

import os
from typing import Any

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import openvino_genai

    precision = PRECISIONS[request["dtype"]]
    # Unless told, a graph keeps keys and values in float16, and processors with bfloat16 compute in it.
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": 1,
    }
    scheduler = openvino_genai.SchedulerConfig()
    # A text of before must not decide what is computed.
    scheduler.enable_prefix_caching = False
    drafter = {}
    if request["drafter"]:
        drafter["draft_model"] = openvino_genai.draft_model(request["drafter"], "CPU", **properties)
    pipeline = openvino_genai.LLMPipeline(request["target"], "CPU", scheduler_config=scheduler, **drafter, **properties)
    num_draft_tokens, max_tokens = request["num_draft_tokens"], request["max_tokens"]
    decoded = [_decoded(pipeline, prompt, num_draft_tokens, max_tokens) for prompt in request["prompts"]]
    return {"version": openvino_genai.__version__, "prompts": decoded}


def _decoded(pipeline: Any, prompt: list[int], num_draft_tokens: int, max_tokens: int) -> dict[str, Any]:
    import numpy
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
    if num_draft_tokens:
        config.num_assistant_tokens = num_draft_tokens
    result = pipeline.generate(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
    tokens = [int(token) for token in result.tokens[0]]
    if not num_draft_tokens:
        return {"tokens": tokens}
    steps = [int(size) for size in result.perf_metrics.raw_metrics.m_batch_sizes]
    said = result.extended_perf_metrics
    totals = said.get_num_draft_tokens(), said.get_num_accepted_tokens()
    return {"tokens": tokens, **counters(steps, totals, num_draft_tokens, max_tokens)}


def counters(steps: list[int], totals: tuple[int, int], num_draft_tokens: int, max_tokens: int) -> dict[str, Any]:
    """Return the counters of the rounds that drafted.

    Args:
        steps: Tokens that every step gave; the first reads the prompt.
        totals: Draft tokens and accepted ones, as OpenVINO has them.

    Raises:
        RuntimeError: The steps are not those of a text of rounds, or do not add up to the totals.
    """
    rounds, written = [], steps[0]
    for size in steps[1:]:
        # No draft is made that could not be kept: the last token of a text is the target's own.
        rounds.append((min(num_draft_tokens, max_tokens - written - 1), size - 1))
        written += size
    drafted, accepted = (sum(one[i] for one in rounds) for i in (0, 1))
    unsaid = rounds[-1] if rounds and rounds[-1][0] == rounds[-1][1] else (0, 0)
    if steps[0] != 1 or written != max_tokens or (drafted - unsaid[0], accepted - unsaid[1]) != totals:
        raise RuntimeError(
            f"the steps gave {steps} tokens, which is {accepted} accepted of {drafted}; OpenVINO says {totals[1]} of {totals[0]}"
        )
    rounds = [one for one in rounds if one[0]]
    return {
        "num_drafts": len(rounds),
        "num_draft_tokens": drafted,
        "num_accepted": accepted,
        "accepted_at": [sum(kept >= i for _, kept in rounds) for i in range(1, num_draft_tokens + 1)],
    }
