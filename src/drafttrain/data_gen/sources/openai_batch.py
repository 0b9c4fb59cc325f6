"""OpenAI batch jobs, as OpenAI and vLLM write them: the file of outputs, joined with the file of requests."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.sources import Item, RecordSettings, sources, stamps
from drafttrain.data_gen.sources.jsonl import lines, matching

READ = ("tools", "functions", "documents", "chat_template_kwargs")
"""Keys of a request that the chat template reads, and that a record has under the same name."""
CHANGES_TEXT = ("chat_template", "add_generation_prompt", "continue_final_message", "echo", "suffix", "stop", "audio")
"""Keys of a request that change what was read, or where the answer ends, in a way that no record can hold."""
ENDED = ("stop", "tool_calls", "function_call")
"""Finish reasons of answers that are complete."""


@dataclass(kw_only=True)
class OpenAIBatchSettings(RecordSettings):
    """Outputs of OpenAI batch jobs and their requests, joined by custom_id."""

    path: str = setting(help="Files of outputs, or a pattern such as batches/*_output.jsonl.")
    requests: str = setting(help="Files of requests, or a pattern: the outputs do not repeat the prompts.")


@sources.register("openai_batch", OpenAIBatchSettings)
class OpenAIBatch:
    """A record for each choice of each output, in the order of the outputs."""

    def __init__(self, settings: OpenAIBatchSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield the records; an output that gives none is yielded with its problem.

        Raises:
            DataError: Two requests have the same custom_id, or a line of the requests has none.
        """
        asked, seen = self._requests(), set[str]()
        for path in matching(self.settings.path):
            for number, item in lines(path):
                item = replace(item, where=f"{path}:{number}")
                try:
                    for value in _records(item, asked, seen):
                        yield replace(item, value=value)
                except BadItem as reason:
                    yield replace(item, problem=str(reason))

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return [stamps(matching(path)) for path in (self.settings.path, self.settings.requests)]

    def _requests(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path in matching(self.settings.requests):
            for number, item in lines(path):
                name = item.value.get("custom_id") if isinstance(item.value, Mapping) else None
                if not isinstance(name, str) or not isinstance(item.value.get("body"), dict):
                    raise DataError(f"{path}:{number}: not a request of a batch job: needs custom_id (text) and body")
                if name in found:
                    raise DataError(f"{path}:{number}: custom_id {name!r} occurs twice in the requests")
                found[name] = item.value["body"]
        return found


def _records(item: Item, asked: Mapping[str, dict[str, Any]], seen: set[str]) -> list[dict[str, Any]]:
    """Return the records of a line of outputs.

    Raises:
        BadItem: It is not a complete answer to one of the requests.
    """
    if item.problem:
        raise BadItem(item.problem)
    name, response = item.value.get("custom_id"), item.value.get("response")
    if not isinstance(name, str):
        raise BadItem("custom_id: must be text: not a line of a batch output")
    if item.value.get("error") or not isinstance(response, Mapping) or response.get("status_code", 200) != 200:
        raise BadItem("response: the request failed")
    if name not in asked:
        raise BadItem(f"custom_id: {name!r} is not in the requests")
    if name in seen:
        raise BadItem(f"custom_id: {name!r} was answered by an earlier line")
    seen.add(name)
    request, body = asked[name], response.get("body")
    if changed := [key for key in CHANGES_TEXT if request.get(key)]:
        raise BadItem(f"body.{changed[0]}: it changes what the target read or wrote in a way that a record cannot hold")
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise BadItem("response.body.choices: has no answer of a chat or a text completion")
    return [
        {"id": name if len(choices) == 1 else f"{name}@{number}"} | _record(request, choice, f"choices.{number}")
        for number, choice in enumerate(choices)
    ]


def _record(request: Mapping[str, Any], choice: Any, key: str) -> dict[str, Any]:
    if not isinstance(choice, Mapping):
        raise BadItem(f"{key}: must be a mapping")
    if choice.get("finish_reason") not in ENDED:
        raise BadItem(f"finish_reason: {key} did not end by itself, got {choice.get('finish_reason')!r}")
    if "message" not in choice:
        return {"prompt": request.get("prompt"), "completion": choice.get("text")}
    message, turns = choice["message"], request.get("messages")
    if not isinstance(message, Mapping) or not isinstance(turns, list):
        raise BadItem(f"{key}.message: must be a mapping, and the request's messages a list")
    if message.get("refusal"):
        raise BadItem(f"refusal: {key} holds a refusal instead of an answer")
    # An answer also holds keys that requests do not have, such as annotations, which are empty unless they change the text.
    answer = {name: part for name, part in message.items() if part not in (None, [], {})}
    # Earlier answers are in the prompt: the job did not write them.
    context = [{**turn, "train": False} if isinstance(turn, Mapping) else turn for turn in turns]
    return {"messages": [*context, answer]} | {name: request[name] for name in READ if request.get(name)}
