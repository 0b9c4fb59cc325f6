"""SGLang's request log (`--log-requests --log-requests-level 3 --log-requests-format json`): one line a finished request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import (
    Exchange,
    LogProbs,
    Refused,
    count,
    ids,
    log_probability,
    mapping,
    sequence,
    text,
)

FINISHED = "request.finished"
RECEIVED = "request.received"


def is_sglang(value: Mapping[str, Any]) -> bool:
    """Return whether a line is of this log."""
    return value.get("event") in (FINISHED, RECEIVED)


def exchanges(value: dict[str, Any], *, id: str) -> list[Exchange]:
    """Return the exchange of a finished request; the line of its arrival gives none, because the later line repeats it.

    Raises:
        Refused: Text and ids are not logged (levels 0 and 1), or a part has the wrong type.
    """
    if value["event"] == RECEIVED:
        return []
    request, response = mapping(value.get("obj"), "obj"), mapping(value.get("out"), "out")
    about = mapping(response.get("meta_info") or {}, "out.meta_info")
    answer_ids = ids(response.get("output_ids"), "out.output_ids")
    if answer_ids is None and response.get("text") is None:
        raise Refused(
            "no_text",
            "the log holds no answers: SGLang writes them at --log-requests-level 2 or more, complete ones at 3",
        )
    prompt = request.get("text")
    finish = mapping(about.get("finish_reason") or {}, "finish_reason")
    sampling = mapping(request.get("sampling_params") or {}, "sampling_params")
    return [
        Exchange(
            id=str(value.get("rid") or id),
            prompt=None if prompt is None else text(prompt, "obj.text"),
            answer=None if response.get("text") is None else text(response["text"], "out.text"),
            prompt_ids=ids(request.get("input_ids"), "obj.input_ids"),
            answer_ids=answer_ids,
            logprobs=_logprobs(about),
            finish="stop_text" if isinstance(finish.get("matched"), str) else str(finish.get("type") or ""),
            num_prompt_tokens=count(about.get("prompt_tokens"), "prompt_tokens"),
            num_answer_tokens=count(about.get("completion_tokens"), "completion_tokens"),
            stops_on_text=bool(sampling.get("stop")),
            incomplete="not_text"
            if request.get("image_data") or request.get("audio_data") or request.get("video_data")
            else "",
        )
    ]


def _logprobs(about: dict[str, Any]) -> LogProbs | None:
    """Return the log-probabilities from (log-probability, id, text) triples."""
    if not about.get("output_token_logprobs") or not about.get("output_top_logprobs"):
        return None
    own = sequence(about["output_token_logprobs"], "output_token_logprobs")
    tops = sequence(about["output_top_logprobs"], "output_top_logprobs")
    if len(own) != len(tops):
        raise Refused("logprobs", "output_token_logprobs and output_top_logprobs differ in length")
    rows = []
    for one, top in zip(own, tops, strict=True):
        row: dict[int | str, float] = {}
        for triple in [one, *sequence(top or [], "output_top_logprobs")]:
            value, token = (*sequence(triple, "output_top_logprobs"), None, None)[:2]
            if type(token) is not int:
                raise Refused("logprobs", "output_top_logprobs: must be (log-probability, id, text)")
            row.setdefault(token, log_probability(value, "output_top_logprobs"))
        rows.append(list(row.items()))
    return rows
