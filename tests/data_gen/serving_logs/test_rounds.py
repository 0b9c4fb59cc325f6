"""Logged rounds of speculation: the rejected positions, or the reason why the rounds are impossible."""

from __future__ import annotations

import json
from typing import Any

import pytest

from drafttrain.data_gen.serving_logs.exchange import LoggedRound, Refused
from drafttrain.data_gen.serving_logs.openai import exchanges
from drafttrain.data_gen.serving_logs.rounds import refusals
from tests.data_gen.serving_logs.log_lines import chat_encoder, completion, ids, read, write

ANSWER = "abcdefgh"


def line(**speculative: Any) -> dict[str, Any]:
    return completion("p", ANSWER, token_ids=ids(ANSWER), speculative=speculative)


def test_a_rejected_draft_token_is_marked_at_the_token_that_replaced_it(tmp_path):
    # a (no draft), bcd + e (all accepted), f (all rejected), gh and past the end.
    logged = line(drafted=[0, 3, 3, 3], accepted=[0, 3, 0, 2])
    (record,), kinds = read(write(tmp_path / "a.jsonl", [logged]))
    assert (list(record.refused), kinds) == ([1 + 5], [])
    # Logged ids of draft tokens give the same result.
    drafted = [[], ids("bcd"), ids("xyz"), ids("ghi")]
    (record,), _ = read(write(tmp_path / "a.jsonl", [line(drafted=drafted, accepted=[0, 3, 0, 3])]))
    assert list(record.refused) == [1 + 5]
    (record,), _ = read(write(tmp_path / "a.jsonl", [line(drafted=[7], accepted=[7])]))
    assert list(record.refused) == [], "known, and none"
    (record,), _ = read(write(tmp_path / "a.jsonl", [completion("p", ANSWER)]))
    assert record.refused is None, "not known"


def test_vllm_logs_no_round_for_the_first_token(tmp_path):
    speculation = {"per_step_drafted": [3, 3, 3], "per_step_accepted": [3, 0, 2], "num_spec_tokens": 3}
    logged = completion("p", ANSWER, token_ids=ids(ANSWER))
    logged["response"]["metrics"] = {"speculative_decoding": speculation}
    (record,), _ = read(write(tmp_path / "a.jsonl", [logged]))
    assert list(record.refused) == [1 + 5]
    # A stream has them in the last chunk, which has no choice.
    chunks = [logged["response"] | {"metrics": None}, {"choices": [], "metrics": {"speculative_decoding": speculation}}]
    (record,), _ = read(write(tmp_path / "a.jsonl", [logged | {"response": chunks}]))
    assert list(record.refused) == [1 + 5]
    for changed in ({"per_step_accepted": None}, {"per_step_drafted": "x"}, {"per_step_accepted": [3, 3, 3, 3]}):
        logged["response"]["metrics"] = {"speculative_decoding": speculation | changed}
        assert read(write(tmp_path / "a.jsonl", [logged]))[1] == ["speculative"]
    logged["response"]["metrics"] = {"speculative_decoding": {"num_spec_tokens": 3}, "tokens_per_second": 3.0}
    assert read(write(tmp_path / "a.jsonl", [logged]))[0][0].refused is None, "a summary has no rounds"


def test_each_chunk_has_a_round_and_a_cut_record_keeps_the_rejections_inside_it(tmp_path):
    pieces = [("a", 0, 0), ("bc", 3, 1), ("defg", 3, 3), ("h", 3, 0)]
    chunks = [
        {"choices": [{"index": 0, "text": text, "speculative": {"drafted": [count], "accepted": [kept]}}]}
        for text, count, kept in pieces
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    streamed = completion("p", "") | {"response": chunks}
    (record,), _ = read(write(tmp_path / "a.jsonl", [streamed]))
    assert list(record.refused) == [1 + 2, 1 + 7]
    (record,), _ = read(tmp_path / "a.jsonl", encoder=chat_encoder(max_length=6))
    assert (len(record.tokens), list(record.refused)) == (6, [1 + 2])


@pytest.mark.parametrize(
    ("speculative", "why"),
    [
        ({"drafted": [3, 3], "accepted": [1]}, "lists of the same length"),
        ({"drafted": 3, "accepted": 1}, "lists of the same length"),
        ({}, "lists of the same length"),
        ({"drafted": [3, 3], "accepted": [4, 3]}, "accept between 0 and all"),
        ({"drafted": [3, 3], "accepted": [-1, 3]}, "accept between 0 and all"),
        ({"drafted": [True, 9], "accepted": [True, 5]}, "accept between 0 and all"),
        ({"drafted": [3.5, 9], "accepted": [1, 5]}, "accept between 0 and all"),
        ({"drafted": [["b"], 9], "accepted": [1, 5]}, "must be integers"),
        ({"drafted": [3, 3], "accepted": [1, 3]}, "the rounds have 6 tokens, the answer 8"),
        ({"drafted": [9, 3], "accepted": [8, 1]}, "begins after the 8 tokens"),
        ({"drafted": [[1, 2, 3], 9], "accepted": [2, 5]}, "accepted other tokens"),
        ({"drafted": [10**30], "accepted": [10**29]}, ""),
    ],
)
def test_impossible_rounds_are_quarantined_with_their_reason(tmp_path, speculative, why):
    path = write(tmp_path / "a.jsonl", [line(**speculative)])
    records, kinds = read(path)
    if not why:
        assert list(records[0].refused) == [], "one round that reaches far past the end"
        return
    assert (records, kinds) == ([], ["speculative"])

    def checked() -> None:
        (exchange,) = exchanges(json.loads(path.read_text()), id="x")
        refusals(exchange.rounds or [], exchange.answer_ids or [])

    with pytest.raises(Refused, match=why):
        checked()


def test_a_last_round_that_an_end_of_text_cut_rejected_nothing():
    # An end of text among the accepted tokens: nothing follows it.
    assert refusals([LoggedRound(3, 1), LoggedRound(3, 2)], [4, 5, 6, 0]) == [1]
    with pytest.raises(Refused, match="the answer 9"):
        refusals([LoggedRound(3, 1), LoggedRound(3, 2)], [1] * 9)
