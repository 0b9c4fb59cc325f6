"""Each dialect gives the served ids, or the line is quarantined; only the target's answer is a label."""

import gzip
import json

import numpy as np
import pytest

from tests.data_gen.serving_logs.log_lines import chat, chat_encoder, completion, ids, read, write


def labels(record) -> str:
    """Return the text of the labels."""
    tokens = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    return chat_encoder().tokenizer.decode(tokens)


def whole(record) -> str:
    return chat_encoder().tokenizer.decode(record.tokens)


def test_text_is_tokenized_through_the_template_and_the_answer_with_its_end_is_the_label(tmp_path):
    (record,), kinds = read(write(tmp_path / "a.jsonl", [chat("Why?", "Because.")]))
    assert (whole(record), labels(record), kinds) == (
        "<user>Why?<|end|><assistant>Because.<|end|>",
        "Because.<|end|>",
        [],
    )
    cut = chat("Why?", "Because.", choice={"finish_reason": "length"})
    (record,), _ = read(write(tmp_path / "a.jsonl", [cut]))
    assert labels(record) == "Because."


def test_counts_of_the_server_show_whether_the_text_has_the_served_tokens(tmp_path):
    prompt = len(ids("<user>Why?")) + 1 + len(ids("<assistant>"))

    def kinds(prompt_tokens: int, completion_tokens: int) -> list[str]:
        line = chat("Why?", "Yes", usage={"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})
        return read(write(tmp_path / "a.jsonl", [line]))[1]

    assert kinds(prompt, 4) == kinds(prompt, 3) == []
    assert kinds(prompt, 2) == kinds(prompt, 5) == kinds(prompt + 1, 4) == ["retokenised"]


def test_logged_ids_are_used_unless_they_decode_to_other_text(tmp_path):
    served = completion("Once", " upon", prompt_token_ids=ids("Once"), token_ids=[*ids(" upon"), 0])
    (record,), _ = read(write(tmp_path / "a.jsonl", [served]))
    assert (record.tokens, sum(record.loss_mask)) == ([*ids("Once upon"), 0], 6)
    for wrong in (
        {"token_ids": ids(" Upon")},
        {"token_ids": [5000]},
        {"token_ids": ids(" upon"), "prompt_token_ids": ids("Twice")},
    ):
        assert read(write(tmp_path / "a.jsonl", [completion("Once", " upon", **wrong)]))[1] == ["wrong_tokenizer"]


def test_every_choice_is_an_exchange_and_chunks_are_merged(tmp_path):
    line = completion("a", "b")
    line["response"]["choices"].append({"index": 1, "text": "c", "finish_reason": "length"})
    records, _ = read(write(tmp_path / "a.jsonl", [line]))
    assert [labels(record) for record in records] == ["b", "c"]
    streamed = [
        {"model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"model": "m", "choices": [{"index": 0, "delta": {"content": "Be"}}]},
        {"model": "m", "choices": [{"index": 0, "delta": {"content": "cause."}, "finish_reason": "stop"}]},
        {"model": "m", "choices": [], "usage": {"prompt_tokens": 22, "completion_tokens": 9}},
    ]
    at_once, _ = read(write(tmp_path / "a.jsonl", [chat("Why?", "Because.")]))
    in_chunks, _ = read(write(tmp_path / "a.jsonl", [chat("Why?", "") | {"response": streamed}]))
    assert in_chunks[0].tokens == at_once[0].tokens
    assert in_chunks[0].loss_mask == at_once[0].loss_mask


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_top_k_rows_are_the_distribution_at_the_labels(tmp_path, form):
    tokens = ids("ok")
    rows = [{token: -0.1, 7: -3.0} for token in tokens]
    named = [{f"token_id:{token}": value for token, value in row.items()} for row in rows]
    if form == "chat":
        content = [
            {
                "token": names[0],
                "logprob": row[names[0]],
                "top_logprobs": [{"token": n, "logprob": row[n]} for n in names],
            }
            for row in named
            for names in [list(row)]
        ]
        line = chat("Q", "ok", choice={"logprobs": {"content": content}})
    else:
        own = [f"token_id:{token}" for token in tokens]
        line = completion("Q", "ok", logprobs={"tokens": own, "token_logprobs": [-0.1, -0.1], "top_logprobs": named})
    (record,), kinds = read(write(tmp_path / "a.jsonl", [line]))
    assert kinds == []
    assert labels(record) == "ok"
    found = [
        dict(zip(*pair, strict=True))
        for pair in zip(record.logged.ids_NK.tolist(), record.logged.log_probs_NK, strict=True)
    ]
    assert [sorted(row) for row in found] == [sorted(row) for row in rows]
    assert np.isclose(found[0][tokens[0]], -0.1)
    assert read(tmp_path / "a.jsonl", logprobs=False)[0][0].logged is None


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"token_id:5": -0.1, "token_id:6": -0.1}, "logprobs"),
        ({"token_id:5": 0.5, "token_id:6": -9}, "logprobs"),
        ({"token_id:5": "x", "token_id:6": -9}, "logprobs"),
        ({"token_id:5": -0.1, "token_id:9999": -9}, "wrong_tokenizer"),
    ],
)
def test_a_row_that_is_not_a_distribution_is_quarantined(tmp_path, row, kind):
    names = list(row)
    logged = {"tokens": names[:1], "token_logprobs": [row[names[0]]], "top_logprobs": [row]}
    text = chat_encoder().tokenizer.decode([5])
    assert read(write(tmp_path / "a.jsonl", [completion("Q", text, logprobs=logged)]))[1] == [kind]


def test_vllm_joins_request_and_answer_by_id_in_both_of_its_forms(tmp_path):
    lines = [
        "INFO 06-10 12:00:00 [api_server.py:1] Started server",
        f"INFO 06-10 [logger.py:43] Received request cmpl-1-0: prompt: 'It\\'s', params: SamplingParams(n=1, stop=[]), "
        f"prompt_token_ids: {ids(chr(73) + 't' + chr(39) + 's')}, prompt_embeds shape: None, lora_request: None.",
        'DEBUG 06-10 [logger.py:43] Request cmpl-2 details: prompt: "It\'s", prompt_token_ids: None, prompt_embeds shape: None.',
        "INFO 06-10 [logger.py:50] Received request cmpl-2: params: SamplingParams(n=1), lora_request: None.",
        "INFO 06-10 [logger.py:60] Generated response cmpl-2 (streaming delta): output: ' c', output_token_ids: [33], finish_reason: None",
        "INFO 06-10 [logger.py:60] Generated response cmpl-2 (streaming complete): output: ' cold', output_token_ids: None, finish_reason: streaming_complete",
        f"INFO 06-10 [logger.py:60] Generated response cmpl-1: output: ' hot', output_token_ids: {ids(' hot')}, finish_reason: length",
        "INFO 06-10 [logger.py:60] Generated response cmpl-9: output: ' hot', output_token_ids: [1], finish_reason: stop",
        "INFO 06-10 [logger.py:60] Generated response cmpl-1: output: ' ho",
    ]
    records, kinds = read(write(tmp_path / "vllm.log", lines))
    assert [whole(record) for record in records] == ["It's cold", "It's hot"]
    assert [labels(record) for record in records] == [" cold", " hot"]
    assert kinds == ["not_a_record", "no_request", "not_a_record"]


def test_sglang_logs_a_request_when_it_is_finished(tmp_path):
    asked = {"rid": "r", "text": "Two", "input_ids": ids("Two"), "sampling_params": {"temperature": 0.0}}
    triples = [[-0.2, token, None] for token in ids(" more")]
    about = {
        "finish_reason": {"type": "length"},
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "output_token_logprobs": triples,
        "output_top_logprobs": [[one, [-2.0, 9, None]] for one in triples],
    }
    done = {"event": "request.finished", "rid": "r", "obj": asked}
    out = {"text": " more", "output_ids": ids(" more"), "meta_info": about}
    lines = [{"event": "request.received", "rid": "r", "obj": asked}, done | {"out": out}]
    cut = [{**asked, "input_ids": [*ids("T"), "...", *ids("o")]}, asked]
    lines += [done | {"obj": cut[0], "out": out}, done | {"out": {"meta_info": about}}]
    records, kinds = read(write(tmp_path / "sglang.log", lines))
    assert [whole(record) for record in records] == ["Two more"]
    assert records[0].logged.ids_NK.shape == (5, 2)
    assert kinds == ["wrong_type", "no_text"]


def test_each_answer_of_a_dump_is_an_exchange(tmp_path):
    said = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    line = {"conversations": [{"from": who, "value": words} for who, words in said]}
    records, _ = read(write(tmp_path / "dump.jsonl", [line, {"prompt": "x", "completion": "y"}]))
    assert [labels(record) for record in records] == ["b<|end|>", "d<|end|>", "y<|end|>"]
    assert whole(records[1]).startswith("<system>S<|end|><user>a<|end|><assistant>b<|end|><user>c")


def test_an_incomplete_prompt_is_quarantined_unless_its_ids_are_logged(tmp_path):
    pictured = chat("Q", "A")
    pictured["request"]["messages"][0]["content"] = [{"type": "text", "text": "Q"}, {"type": "image_url"}]
    tools = chat("Q", "A")
    tools["request"]["tools"] = [{"type": "function"}]
    template = chat("Q", "A")
    template["request"]["chat_template"] = "{{ 1 }}"
    smuggled = chat("Q", "A")
    smuggled["request"]["chat_template_kwargs"] = {"chat_template": "{{ 1 }}"}
    thought = chat("Q", "A", choice={"message": {"content": "A", "reasoning_content": "Hm"}})
    failed = {"request": {"prompt": "x"}, "response": {"error": {"message": "no"}}}
    lines = [pictured, tools, template, smuggled, thought, failed]
    _, kinds = read(write(tmp_path / "a.jsonl", lines))
    assert kinds == ["not_text", "tool_calls", "chat_template", "template", "no_text", "failed"]
    pictured["response"] |= {"prompt_token_ids": ids("any picture")}
    pictured["response"]["choices"][0]["token_ids"] = ids("A")
    records, _ = read(write(tmp_path / "a.jsonl", [pictured]))
    assert whole(records[0]) == "any pictureA"


def test_gzip_and_rotated_files_are_read_oldest_first_and_a_damaged_one_is_quarantined(tmp_path):
    write(tmp_path / "log.jsonl", [completion("3", "c")])
    write(tmp_path / "log.jsonl.1", [completion("2", "b")])
    packed = gzip.compress((json.dumps(completion("1", "a")) + "\n").encode())
    (tmp_path / "log.jsonl.2.gz").write_bytes(packed)
    (tmp_path / "log.jsonl.10.gz").write_bytes(packed[:20])
    records, kinds = read(tmp_path)
    assert [whole(record) for record in records] == ["1a", "2b", "3c"]
    assert kinds == ["damaged"]


def test_answers_of_other_models_are_quarantined_by_name_or_by_the_first_one(tmp_path):
    other = json.loads(json.dumps(completion("1", "a")).replace('"m"', '"other"'))
    path = write(tmp_path / "a.jsonl", [completion("2", "b"), other])
    assert [whole(record) for record in read(path)[0]] == ["2b"]
    records, kinds = read(path, model="other")
    assert ([whole(record) for record in records], kinds) == (["1a"], ["wrong_model"])


def test_keys_beside_the_turns_of_a_dump_are_read_or_quarantine_it(tmp_path):
    def turns(asked):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]

    call = {"from": "function_call", "value": "{}"}
    lines = [
        {"messages": turns("q"), "system": "s"},
        {"messages": [*turns("r"), *turns("x")[:1], {"role": "assistant", "content": "bad", "weight": 0}], "id": "w"},
        {"messages": turns("s"), "functions": [{"name": "f"}]},
        {"conversations": [{"from": "human", "value": "t"}, call]},
        {"messages": [{"role": "system", "content": "t"}, *turns("u")], "system_prompt": "s"},
    ]
    records, kinds = read(write(tmp_path / "d.jsonl", lines), near_duplicates=None)
    assert [chat_encoder().tokenizer.decode(record.tokens) for record in records] == [
        "<system>s<|end|><user>q<|end|><assistant>a<|end|>",
        "<user>r<|end|><assistant>a<|end|>",
    ]
    assert kinds == ["tool_calls", "tool_calls", "two_systems"]
