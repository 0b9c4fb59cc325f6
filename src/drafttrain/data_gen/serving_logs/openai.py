"""The OpenAI protocol's chat and text completions, as gateways, recorders and batch jobs log them.

A line holds the request (under `request` or `body`, or at the top) and the response (under `response`, or at the top): whole, or
as the list of its chunks. vLLM's and SGLang's additions (token ids) are read where present, and so are the rounds of
speculation: `speculative` of a choice, or vLLM's `metrics.speculative_decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import (
    Exchange,
    LoggedRound,
    LogProbs,
    Refused,
    count,
    ids,
    log_probability,
    mapping,
    sequence,
    text,
    turns,
)
from drafttrain.data_gen.serving_logs.rounds import logged_rounds, vllm_rounds
from drafttrain.data_gen.serving_logs.stream import merged

ID_PREFIX = "token_id:"
"""How vLLM writes a token when ids are requested (return_tokens_as_token_ids)."""


def is_openai(value: Mapping[str, Any]) -> bool:
    """Return whether a line is of this protocol."""
    return "choices" in value or "response" in value or "chunks" in value


def exchanges(value: dict[str, Any], *, id: str) -> list[Exchange]:
    """Return the exchanges of a line, one for each choice.

    Raises:
        Refused: A part is missing or of the wrong type, or the request failed.
    """
    request = mapping(value.get("request", value.get("body", value)), "request")
    response = _response(value)
    asked = _asked(request, response)
    usage = mapping(response.get("usage") or {}, "usage")
    choices = [mapping(one, f"choices.{i}") for i, one in enumerate(sequence(response.get("choices"), "choices"))]
    if not choices:
        raise Refused("empty", "choices: has no answer")
    base = str(value.get("id") or response.get("id") or id)
    answered = count(usage.get("completion_tokens"), "usage.completion_tokens") if len(choices) == 1 else None
    return [
        Exchange(
            id=base if len(choices) == 1 else f"{base}@{i}",
            **asked | _prompt_ids(response, choice),
            **_answer(choice, f"choices.{i}"),
            rounds=_rounds(response, choices, i),
            num_prompt_tokens=count(usage.get("prompt_tokens"), "usage.prompt_tokens"),
            num_answer_tokens=answered,
            domain=_word(value.get("domain")),
        )
        for i, choice in enumerate(choices)
    ]


def _response(value: dict[str, Any]) -> dict[str, Any]:
    response = value.get("response", value.get("chunks", value))
    if isinstance(response, list):
        return merged(response)
    response = mapping(response, "response")
    if response.get("error"):
        raise Refused("failed", "the server answered with an error")
    if "choices" not in response and "body" in response:
        status = response.get("status_code", 200)
        if status != 200:
            raise Refused("failed", "the server answered with an error")
        return mapping(response["body"], "response.body")
    return response


def _asked(request: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an exchange that come from the request."""
    incomplete = ""
    prompt: Any = None
    prompt_ids = None
    if "messages" in request:
        prompt, incomplete = turns(request["messages"], "messages")
        incomplete = "tool_calls" if request.get("tools") or request.get("functions") else incomplete
        if request.get("chat_template"):
            # A template in a log is a stranger's program: it is never run.
            incomplete = "chat_template"
        if request.get("continue_final_message") or request.get("add_generation_prompt") is False:
            incomplete = incomplete or "continued"
    elif isinstance(request.get("prompt"), list):
        prompts = request["prompt"]
        if all(type(one) is int for one in prompts):
            prompt_ids = prompts
        elif len(prompts) == 1:
            prompt = text(prompts[0], "prompt.0")
        else:
            raise Refused("several_prompts", "prompt: must be one text or token ids, got a list of texts")
    else:
        prompt = text(request.get("prompt"), "prompt")
    if request.get("echo") or request.get("suffix"):
        raise Refused("echo", "the answer repeats the prompt, or fills a gap")
    arguments = mapping(request.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "incomplete": incomplete,
        "model": _word(response.get("model")) or _word(request.get("model")),
        "user": _word(request.get("user")),
        "stops_on_text": bool(request.get("stop")),
        "template_arguments": {k: v for k, v in arguments.items() if isinstance(v, bool | int | float | str)},
    }


def _prompt_ids(response: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("prompt_token_ids", response.get("prompt_token_ids"))
    return {} if found is None else {"prompt_ids": ids(found, "prompt_token_ids")}


def _answer(choice: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the fields of an exchange that come from a choice."""
    answer: str | None
    if "message" in choice:
        message = mapping(choice["message"], f"{key}.message")
        parsed_away = any(
            message.get(name) for name in ("tool_calls", "function_call", "reasoning_content", "reasoning")
        )
        answer = None if parsed_away or message.get("content") is None else text(message["content"], f"{key}.content")
    else:
        answer = text(choice.get("text"), f"{key}.text")
    finish = choice.get("finish_reason")
    stopped_on_text = isinstance(choice.get("stop_reason"), str)
    return {
        "answer": answer,
        "answer_ids": ids(choice.get("token_ids"), f"{key}.token_ids"),
        "logprobs": _logprobs(choice.get("logprobs"), f"{key}.logprobs"),
        "finish": "stop_text" if stopped_on_text else finish if isinstance(finish, str) else "",
    }


def _rounds(response: dict[str, Any], choices: Sequence[dict[str, Any]], i: int) -> Sequence[LoggedRound] | None:
    found = logged_rounds(choices[i].get("speculative"), f"choices.{i}.speculative")
    # vLLM reports rounds by response: they belong to an answer only if it is the only one.
    return vllm_rounds(response) if found is None and len(choices) == 1 else found


def _logprobs(logged: Any, key: str) -> LogProbs | None:
    """Return the logged log-probabilities, in the form of chats or the older one of text completions."""
    if logged is None:
        return None
    logged = mapping(logged, key)
    if logged.get("content") is not None:
        return [_chat_row(mapping(one, key), key) for one in sequence(logged["content"], f"{key}.content")]
    if logged.get("tokens") is None or logged.get("token_logprobs") is None:
        return None
    tokens, values = sequence(logged["tokens"], key), sequence(logged["token_logprobs"], key)
    tops = sequence(logged.get("top_logprobs") or [None] * len(tokens), key)
    if not len(tokens) == len(values) == len(tops):
        raise Refused("logprobs", f"{key}: tokens, token_logprobs and top_logprobs differ in length")
    rows = []
    for token, value, top in zip(tokens, values, tops, strict=True):
        others = mapping(top or {}, f"{key}.top_logprobs").items()
        pairs = [(token, value), *((other, number) for other, number in others if other != token)]
        rows.append([(_token(one, key), log_probability(number, key)) for one, number in pairs])
    return rows


def _chat_row(entry: dict[str, Any], key: str) -> list[tuple[int | str, float]]:
    pairs = [entry, *sequence(entry.get("top_logprobs") or [], key)]
    row: dict[int | str, float] = {}
    for pair in pairs:
        here = mapping(pair, key)
        row.setdefault(_token(here.get("token"), key), log_probability(here.get("logprob"), key))
    return list(row.items())


def _token(value: Any, key: str) -> int | str:
    word = text(value, f"{key}.token")
    number = word.removeprefix(ID_PREFIX)
    return int(number) if number != word and number.isascii() and number.isdigit() and len(number) < 10 else word


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
