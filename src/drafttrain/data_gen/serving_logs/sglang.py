"""SGLang's request log (`--log-requests --log-requests-level 3 --log-requests-format json`): one line a finished request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import (
    Exchange,
    Law,
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
    """Tell whether a line is of this log."""
    return value.get("event") in (FINISHED, RECEIVED)


def exchanges(value: dict[str, Any], *, id: str) -> list[Exchange]:
    """Return the exchange of a finished request; the line of its arrival gives none, the other one says all of it.

    Raises:
        Refused: Text and ids are not logged (levels 0 and 1), or a part is of the wrong type.
    """
    if value["event"] == RECEIVED:
        return []
    asked, answered = mapping(value.get("obj"), "obj"), mapping(value.get("out"), "out")
    about = mapping(answered.get("meta_info") or {}, "out.meta_info")
    answer_ids = ids(answered.get("output_ids"), "out.output_ids")
    if answer_ids is None and answered.get("text") is None:
        raise Refused(
            "no_text", "the log holds no answers: SGLang writes them from --log-requests-level 2 on, whole ones at 3"
        )
    prompt = asked.get("text")
    finish = mapping(about.get("finish_reason") or {}, "finish_reason")
    sampling = mapping(asked.get("sampling_params") or {}, "sampling_params")
    return [
        Exchange(
            id=str(value.get("rid") or id),
            prompt=None if prompt is None else text(prompt, "obj.text"),
            answer=None if answered.get("text") is None else text(answered["text"], "out.text"),
            prompt_ids=ids(asked.get("input_ids"), "obj.input_ids"),
            answer_ids=answer_ids,
            law=_law(about),
            finish="stop_text" if isinstance(finish.get("matched"), str) else str(finish.get("type") or ""),
            num_prompt_tokens=count(about.get("prompt_tokens"), "prompt_tokens"),
            num_answer_tokens=count(about.get("completion_tokens"), "completion_tokens"),
            stops_on_text=bool(sampling.get("stop")),
            untold="not_text" if asked.get("image_data") or asked.get("audio_data") or asked.get("video_data") else "",
        )
    ]


def _law(about: dict[str, Any]) -> Law | None:
    """Return the law from (log-probability, id, text) triples."""
    if not about.get("output_token_logprobs") or not about.get("output_top_logprobs"):
        return None
    own = sequence(about["output_token_logprobs"], "output_token_logprobs")
    tops = sequence(about["output_top_logprobs"], "output_top_logprobs")
    if len(own) != len(tops):
        raise Refused("logprobs", "output_token_logprobs and output_top_logprobs are not of one length")
    rows = []
    for one, top in zip(own, tops, strict=True):
        row: dict[int | str, float] = {}
        for triple in [one, *sequence(top or [], "output_top_logprobs")]:
            value, token = (*sequence(triple, "output_top_logprobs"), None, None)[:2]
            if type(token) is not int:
                raise Refused("logprobs", "output_top_logprobs: (log-probability, id, text) is needed")
            row.setdefault(token, log_probability(value, "output_top_logprobs"))
        rows.append(list(row.items()))
    return rows
