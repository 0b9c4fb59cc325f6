"""Every planted fault is found under its kind, and its corrected twin has no finding."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from drafttrain.data_gen.data_check import KINDS, Checker, Finding, ReadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.openai_client import Completions, Patience
from drafttrain.data_gen.served_ids import served_differences
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings
from tests.data_gen.chats import CHATML, GENERATION, RICH, chat_tokenizer
from tests.data_gen.four_templates import TEMPLATES, THINKING

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
THOUGHT = ANSWER | {"reasoning_content": "hm"}
CALL = ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
ASKED = "<|im_start|>user\nq<|im_end|>\n"
HEAD = "<|im_start|>assistant\n"
GOOD = ASKED + HEAD + "[[a<|im_end|>]]\n"
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""Its generation prompt opens a thought."""
FORGETS = RICH.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
SHORT = GENERATION.replace("<|im_end|>{%- endgeneration %}", "{%- endgeneration %}<|im_end|>")
WIDE = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
EXACT = WIDE.replace("{% generation %}<|im_start|>assistant\n", "<|im_start|>assistant\n{% generation %}")


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def row(text: str, template: str = CHATML) -> dict[str, Any]:
    """Return input_ids and labels of a rendered chat whose labels are in [[ ]]."""
    tokens, labels = list[int](), list[int]()
    for number, piece in enumerate(text.replace("]]", "[[").split("[[")):
        ids = list(chat_tokenizer(template)(piece, add_special_tokens=False).input_ids)
        tokens += ids
        labels += ids if number % 2 else [-100] * len(ids)
    return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}


def checked(folder: Path, tokenizer: Any, *values: Any, max_length: int = 400, **reading: Any) -> list[ReadItem]:
    """Return the records of a file as the check reads them."""
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    settings = JSONLSettings(path=str(path), **reading)
    encoder = Encoder(tokenizer, max_length).reading_as(settings)
    return list(Checker(JSONL(settings), encoder).items())


def kinds_of(items: Sequence[ReadItem]) -> set[str]:
    return {finding.kind for item in items for finding in item.findings}


PLANTED: list[tuple[str, str | tuple[str, str], Any, Any]] = [
    ("no label", CHATML, chat(USER, ANSWER | {"weight": 0}), chat(USER, ANSWER)),
    ("no label", CHATML, chat(USER), chat(USER, ANSWER)),
    ("no label", CHATML, row(GOOD.replace("[[", "").replace("]]", "")), row(GOOD)),
    ("all labels", CHATML, row("[[" + GOOD.replace("[[", "").replace("]]", "") + "]]"), row(GOOD)),
    ("all labels", CHATML, {"text": GOOD.replace("[[", "").replace("]]", "")}, {"text": "no chat"}),
    ("all labels", CHATML, {"tokens": [70, 71, 72], "loss_mask": [1, 1, 1]}, {"tokens": [70, 71, 72], "loss_mask": [0, 0, 1]}),
    ("generation prompt", CHATML, row(ASKED + f"[[{HEAD}a<|im_end|>]]\n"), row(GOOD)),
    (
        "generation prompt",
        CHATML,
        {"prompt": ASKED, "completion": f"{HEAD}a<|im_end|>\n"},
        {"prompt": ASKED + HEAD, "completion": "a<|im_end|>\n"},
    ),
    ("end of answer", CHATML, row(ASKED + HEAD + "[[a]]<|im_end|>\n"), row(GOOD)),
    ("outside answers", CHATML, row(GOOD.replace("\nq<", "\n[[q]]<")), row(GOOD)),
    ("outside answers", CHATML, row(ASKED + HEAD + "[[a<|im_end|>\n]]"), row(GOOD)),
    ("part of an answer", CHATML, row(ASKED + HEAD + "ab[[cd<|im_end|>]]\n"), row(GOOD)),
    ("part of an answer", CHATML, row(ASKED + HEAD + "[[ab]]cd[[ef<|im_end|>]]\n"), row(GOOD)),
    ("thoughts", RICH, row(ASKED + HEAD + "<think>hm</think>[[a<|im_end|>]]\n"), row(ASKED + HEAD + "[[<think>hm</think>a<|im_end|>]]\n")),
    ("thoughts", OPENS, row(ASKED + HEAD + "[[<think>\nhm</think>a<|im_end|>]]\n"), row(ASKED + HEAD + "<think>\n[[hm</think>a<|im_end|>]]\n")),
    ("thoughts", THINKING, chat(USER, ANSWER), chat(USER, ANSWER, chat_template_kwargs={"enable_thinking": False})),
    ("thoughts", THINKING, chat(USER, ANSWER), chat(USER, THOUGHT)),
    ("marks", (SHORT, GENERATION), chat(USER, ANSWER), chat(USER, ANSWER)),
    ("marks", (WIDE, EXACT), chat(USER, ANSWER), chat(USER, ANSWER)),
    ("rewritten", FORGETS, chat(USER, THOUGHT, USER, ANSWER), chat(USER, ANSWER, USER, THOUGHT)),
    ("cut", CHATML, chat(USER, ANSWER | {"content": "b" * 500}), chat(USER, ANSWER)),
    ("cut", CHATML, {"prompt": "q", "completion": "b" * 500, "chat": False}, {"prompt": "q", "completion": "b", "chat": False}),
    ("unfinished", CHATML, chat(USER, ANSWER, finish_reason="length"), chat(USER, ANSWER, finish_reason="stop")),
    ("unfinished", CHATML, chat(USER, ANSWER | {"finish_reason": "length"}), chat(USER, ANSWER | {"finish_reason": "stop"})),
    ("unfinished", CHATML, chat(USER, ANSWER | {"content": "<think>hm"}), chat(USER, ANSWER | {"content": "<think>hm</think>a"})),
    ("unfinished", CHATML, row(ASKED + HEAD + "[[ab]]"), row(GOOD)),
    ("duplicate", CHATML, [chat(USER, ANSWER, id="1"), chat(USER, ANSWER, id="2")], [chat(USER, ANSWER), chat(USER, CALL | {"tool_calls": None, "content": "b"})]),
    ("duplicate", CHATML, [chat(USER, ANSWER), chat(USER, ANSWER | {"content": " A "})], [chat(USER, ANSWER), chat(USER, USER, ANSWER)]),
    ("quarantined", CHATML, chat(USER, {"role": "mage", "content": "a"}), chat(USER, ANSWER)),
    ("quarantined", (CHATML, RICH), chat(USER, CALL), chat(USER, CALL)),
    ("untemplated", CHATML, {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "chat": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "template", "bad", "good"), PLANTED)
def test_a_planted_fault_is_found_and_its_corrected_twin_is_clean(tmp_path, kind, template, bad, good):
    templates = template if isinstance(template, tuple) else (template, template)
    found = []
    for source, values in zip(templates, (bad, good), strict=True):
        listed = values if isinstance(values, list) else [values]
        found.append(kinds_of(checked(tmp_path, chat_tokenizer(source), *listed)))
    assert found == [{kind}, set()]


def test_every_kind_of_finding_is_planted():
    assert len(PLANTED) >= 20
    assert {kind for kind, *_ in PLANTED} | {"rendering", "server"} == set(KINDS)


def test_a_token_across_the_end_of_a_prompt_is_trained_differently_by_others(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_tokens(["\nab"])
    (item,) = checked(tmp_path, tokenizer, chat(USER, ANSWER | {"content": "ab"}))
    (finding,) = item.findings
    assert finding.kind == "rendering"
    assert "'\\nab" in finding.what
    assert "by the tokenizer's apply_chat_template" in finding.what
    assert kinds_of(checked(tmp_path, tokenizer, chat(USER, ANSWER))) == set()


async def served(tokenizer: Any, items: Sequence[ReadItem], encoder: Encoder) -> list[Finding]:
    """Compare with a server on loopback that tokenizes as vLLM does: arguments of calls come as text and are parsed."""

    async def tokenize(request: web.Request) -> web.Response:
        asked = await request.json()
        for turn in asked["messages"]:
            for call in turn.get("tool_calls", []):
                assert call["id"]
                assert isinstance(call["function"]["arguments"], str)
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if any("refused" in turn["content"] for turn in asked["messages"]):
            return web.json_response({"error": "too long"}, status=400)
        ids = tokenizer.apply_chat_template(
            asked["messages"],
            tools=asked.get("tools"),
            add_generation_prompt=asked["add_generation_prompt"],
            return_dict=True,
            **asked["chat_template_kwargs"],
        )["input_ids"]
        return web.json_response({"count": len(ids), "max_model_len": 4096, "tokens": ids})

    app = web.Application()
    app.router.add_post("/tokenize", tokenize)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with Completions(f"http://127.0.0.1:{port}/v1", None, Patience(0, 0.0, 1.0, 30.0)) as server:
            chats = [(item.where, item.chat) for item in items if item.chat]
            return await served_differences(chats, encoder, server, model="m")
    finally:
        await runner.cleanup()


CHATS = [
    chat(USER, CALL, {"role": "tool", "content": "1"}, ANSWER, tools=[{"name": "f", "parameters": {}}]),
    chat({"role": "system", "content": "s"}, USER, THOUGHT),
    chat(USER, ANSWER, USER),
]


def test_a_server_with_the_same_template_agrees_and_others_are_named(tmp_path):
    encoder = Encoder(chat_tokenizer(RICH), 4000)
    items = checked(tmp_path, encoder.tokenizer, *CHATS, max_length=4000)
    assert len(items) == 3
    assert kinds_of(items) == set()
    assert asyncio.run(served(chat_tokenizer(RICH), items, encoder)) == []
    other = asyncio.run(served(chat_tokenizer("{{ bos_token }}" + RICH), items, encoder))
    assert [(one.kind, "'<s>" in one.what) for one in other] == [("server", True)] * 3
    # A server whose generation prompt alone differs.
    asks = asyncio.run(
        served(chat_tokenizer(RICH.replace("assistant\n{% endif", "assistant\n<think>{% endif")), items, encoder)
    )
    assert ["the server, prompt" in one.what for one in asks] == [True] * 3
    refused = checked(tmp_path, encoder.tokenizer, chat(USER | {"content": "refused"}, ANSWER))
    (finding,) = asyncio.run(served(chat_tokenizer(RICH), refused, encoder))
    assert "the server refuses the chat: http_400" in finding.what


def answers_of(value: dict[str, Any], template: Any) -> str:
    """Return what the target writes in a record of the demo data, all answers joined."""
    if "conversations" not in value:
        return template.written(value.get("output") or value["answer"])
    parts = {"gpt": template.written, "function_call": template.called}
    return "".join(parts[turn["from"]](turn["value"]) for turn in value["conversations"] if turn["from"] in parts)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "file",
    ["llamafactory_demo/alpaca_en_demo.json", "llamafactory_demo/glaive_toolcall_en_demo.json", "gsm8k/train.jsonl"],
)
def test_real_chats_are_read_masked_and_clean_with_four_templates(shared_folder, tmp_path, file, name):
    path, template = shared_folder / "data" / file, TEMPLATES[name]
    settings = JSONLSettings(path=str(path), chat_template_kwargs=template.arguments)
    encoder = Encoder(template.tokenizer(), 1 << 16).reading_as(settings)
    values = [item.value for item in JSONL(settings).items()][:12]
    items = list(Checker(JSONL(settings), encoder).items(max_items=12))
    num_read, earlier = 0, list[Any]()
    for value, item in zip(values, items, strict=True):
        calls = any(turn["from"] == "function_call" for turn in value.get("conversations", []))
        if calls and template.call is None:
            assert "leaves out 'tool_calls'" in item.reason or "roles must alternate" in item.reason
            continue
        labels = [
            token
            for record in item.records
            for token, flag in zip(record.tokens, record.loss_mask, strict=True)
            if flag
        ]
        assert encoder.decoded(labels) == answers_of(value, template)
        several = len(item.records) > 1
        assert several == (name == "thinking" and len(value.get("conversations", [])) > 2)
        # Some chats of the demo are there twice.
        true = ({"rewritten"} if several else set()) | ({"duplicate"} if value in earlier else set())
        assert {finding.kind for finding in item.findings} == true
        num_read, earlier = num_read + 1, [*earlier, value]
    assert num_read == 12 or (template.call is None and num_read >= 3)
