"""Figures from counts by hand; paired intervals; messages of prompts and gate."""

import json

import numpy as np
import pytest

from drafttrain.core.errors import DataError
from drafttrain.core.generations import Generation, Round
from drafttrain.eval.gate import shortfalls
from drafttrain.eval.interval import Interval
from drafttrain.eval.metrics import counts_of, mbsu, totals_of
from drafttrain.eval.parity import Parity
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.replay import ReplayRows, expected_rounds
from drafttrain.eval.result import read_result
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.eval.table import slice_rows
from tests.conftest import byte_tokenizer
from tests.eval import results


def generation(accepted: list[int], drafted: int = 5) -> Generation:
    rounds, start = [], 0
    for count in accepted:
        rounds.append(Round(start, drafted, drafted, count, count + 1, "reject"))
        start += count + 1
    return Generation("a", "", [1], list(range(start)), rounds, 0, 0, 0, 1.0)


def test_rates_by_hand():
    totals = totals_of([counts_of(generation([5, 0, 2])), counts_of(generation([1]))])
    assert totals.block_efficiency == (6 + 1 + 3 + 2) / 4
    assert totals.draft_acceptance_rate == 8 / 20
    assert totals.acceptance_by_position == [3 / 4, 2 / 4, 1 / 4, 1 / 4, 1 / 4]
    assert totals.conditional_acceptance == [3 / 4, 2 / 3, 1 / 2, 1, 1]


def test_conditional_acceptance_counts_rounds_that_drafted_the_token_and_accepted_the_one_before():
    def rounds(pairs):
        made = [Round(i, drafted, drafted, kept, kept + 1, "reject") for i, (drafted, kept) in enumerate(pairs)]
        return totals_of([counts_of(Generation("a", "", [1], list(range(99)), made, 0, 0, 0, 1.0))])

    # The first round accepted one token and drafted no second; the second round rejected its first token.
    assert rounds([(1, 1), (2, 0), (2, 2)]).conditional_acceptance == [2 / 3, 1.0]
    assert rounds([(5, 1), (1, 1)]).conditional_acceptance[:2] == [1.0, 0.0]


def test_an_output_counts_up_to_its_first_repetition():
    looping = generation([5] * 10)
    looping = Generation("a", "", [1], [1, 2, 3] * 20, looping.rounds, 0, 0, 0, 1.0)
    assert counts_of(looping, repetition_ngram=12).num_rounds == 3
    assert counts_of(looping).num_rounds == 10


def test_mbsu_is_tau_over_one_plus_c_gamma_for_an_independent_drafter():
    target, drafter, rounds, tokens, gamma = 1000, 50, 10, 27, 5
    bytes_read = rounds * (target + gamma * drafter)
    found = mbsu(num_tokens=tokens, num_rounds=rounds, plain_bytes=rounds * target, bytes_read=bytes_read)
    assert found == pytest.approx(2.7 / (0.05 * gamma + 1))
    assert mbsu(num_tokens=27, num_rounds=10, plain_bytes=10.0, bytes_read=10.0) == 2.7
    assert mbsu(num_tokens=10, num_rounds=10, plain_bytes=10.0, bytes_read=10.0) == 1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_replay_of_independent_flags_is_the_geometric_series(k):
    a, count = 0.7, 4000
    rows = ReplayRows("x", np.full((count, 1), a), np.full(count, a))
    assert count / expected_rounds(rows, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a), rel=2e-3)


def test_replay_by_start_is_not_replay_by_position():
    """Where acceptance falls with depth, one acceptance per position gives another number."""
    flags = np.array([0.8, 0.6, 0.5, 0.3, 0.2])
    by_depth = ReplayRows("x", np.tile(flags, (4000, 1)), np.full(4000, 0.8))
    expected = 1 + np.cumprod(flags).sum()
    # accepted_TK[t, i] belongs to the round that starts at t.
    assert 4000 / expected_rounds(by_depth, 5) == pytest.approx(expected, rel=5e-3)


def test_a_paired_interval_is_narrower_than_the_spread_of_the_prompts():
    generator = np.random.default_rng(0)
    rounds = generator.integers(20, 40, 60)
    tokens = rounds * generator.uniform(1.2, 3.5, 60)
    paired = ratio_difference((tokens * 1.05, rounds), (tokens, rounds))
    alone = ratio_interval(tokens, rounds)
    assert paired.low > 0
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    assert alone.low < alone.value < alone.high
    assert paired.p_value < 0.01


def test_the_gate_reports_by_how_much_a_figure_is_short():
    figures = results.figures(
        block_efficiency=Interval(1.9, 1.8, 2.0, 64),
        mbsu=1.1,
        parity=Parity(False, 64, 63, 0, 1, [], "63 of 64 outputs equal"),
    )
    require = {"block_efficiency": 2.0, "mbsu": 1.0, "parity": True, "gain_over_start": 0.1}
    assert shortfalls(results.result({"d": figures}), require, drafter="d") == [
        "block_efficiency: 1.900, required 2: 0.100 short",
        "parity: 63 of 64 outputs equal",
        "gain_over_start: not measured",
    ]


def test_a_file_of_prompts_is_read_like_a_source(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes("\ufeff".encode() + '{"text": "a\u2028b\u0085c"}\n'.encode() + b'{"tokens": [5]}\n')
    first, second = read_prompts(str(path), byte_tokenizer(), prompt_tokens=None)
    assert byte_tokenizer().decode(list(first.tokens)) == "a\u2028b\u0085c"
    assert (second.id, list(second.tokens)) == ("2", [5])
    path.write_bytes(b'{"tokens": [5000]}\n{"tokens": []}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(str(path), byte_tokenizer(), prompt_tokens=4)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  line 1", "  line 2", "  line 3"]
    assert "5000 is not an id" in lines[1]
    assert "not JSON" in lines[3]


def test_all_bad_prompts_are_reported_at_once(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = ['{"text": "ok"}', "no json", '{"id": "1", "text": "again"}', '{"id": "x"}', "[]"]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_prompts(str(path), byte_tokenizer(), prompt_tokens=4)
    assert [f"  line {n}:" in str(caught.value) for n in (1, 2, 3, 4, 5)] == [False, True, True, True, True]
    path.write_text(json.dumps({"id": "a", "text": "abcdefgh"}))
    (prompt,) = read_prompts(str(path), byte_tokenizer(), prompt_tokens=4)
    assert byte_tokenizer().decode(list(prompt.tokens)) == "abcd"
    with pytest.raises(DataError, match="no prompt is left of 1"):
        read_prompts(str(path), byte_tokenizer(), prompt_tokens=4, dropped=["a"])


def test_the_table_of_domains_has_a_row_for_each_domain_and_a_column_for_each_arm():
    few, many = Interval(1.5, 1.2, 1.8, 3), Interval(2.0, 1.9, 2.1, 8)
    arms = {name: results.figures(slices={"domain": {"code": few, "math": many}}) for name in ("drafter", "start")}
    (part,) = results.result(arms).temperatures
    assert slice_rows(part, "domain") == [
        ["code", "3", *["1.50 [1.20, 1.80]*"] * 2],
        ["math", "8", *["2.00 [1.90, 2.10]"] * 2],
    ]
    assert slice_rows(results.result().temperatures[0], "domain") == []


def test_an_older_result_is_read_with_what_it_lacks(tmp_path):
    older = results.result({"d": results.figures(parity=Parity(False, 2, 1, 0, 0, [], "1 of 2"))}).json()
    del older["target"]["dtype"]
    found = older["temperatures"][0]["drafters"]["d"]
    del found["slices"]
    found["domains"] = {"code": 1.5}
    found["parity"] = {
        "exact": False,
        "num_prompts": 2,
        "num_equal": 1,
        "text": "1 of 2",
        "divergences": [
            {"id": "a", "position": 1, "plain_token": 1, "drafted_token": 2, "logit_gap": -0.1, "near_tie": True}
        ],
    }
    (tmp_path / "eval.json").write_text(json.dumps(older | {"format": 3}))
    read = read_result(tmp_path / "eval.json").temperatures[0].drafters["d"]
    assert (read.slices["domain"]["code"].value, read.parity.num_near_ties, read.parity.lossless) == (1.5, 1, True)
