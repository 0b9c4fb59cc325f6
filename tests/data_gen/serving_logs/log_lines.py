"""Lines as serving stacks write them, for tests of their readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drafttrain.core.texts import Record
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.sources.serving_logs import ServingLogs
from tests.conftest import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_encoder(*, max_length: int = 256) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, max_length)


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text).input_ids)


def chat(question: str, answer: str, **response: Any) -> dict[str, Any]:
    """Return a chat's request and response."""
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    return {
        "request": {"model": "m", "messages": [{"role": "user", "content": question}]},
        "response": {"id": f"chat-{question}", "model": "m", "choices": [choice | response.pop("choice", {})]}
        | response,
    }


def completion(prompt: str, answer: str, **choice: Any) -> dict[str, Any]:
    """Return a text completion's request and response."""
    return {
        "request": {"model": "m", "prompt": prompt},
        "response": {"model": "m", "choices": [{"index": 0, "text": answer, "finish_reason": "length"} | choice]},
    }


def write(path: Path, lines: list[Any]) -> Path:
    """Write values as JSON, bytes and text unchanged."""
    with path.open("wb") as file:
        for line in lines:
            file.write(
                line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            )
            file.write(b"\n")
    return path


def read(path: Path, *, encoder: Encoder | None = None, **settings: Any) -> tuple[list[Record], list[str]]:
    """Return the records of a log and the kinds of reasons of quarantined lines."""
    source = ServingLogs(ServingLogsSettings(path=str(path), **settings))
    records: list[Record] = []
    kinds = []
    for item in source.items():
        try:
            if item.problem:
                raise BadItem(item.problem)
            records += source.records(item, encoder or chat_encoder())
        except BadItem as reason:
            kinds.append(str(reason).partition(":")[0])
    return records, kinds
