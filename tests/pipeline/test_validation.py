"""The estimate on held-out texts: its figure, and the interval that training curves are drawn with."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafttrain.config.load import load_recipe
from drafttrain.eval.replay import ReplayRows, expected_rounds, replay_rows
from drafttrain.eval.statistics import ratio_interval
from drafttrain.pipeline.data import write_texts
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.validation import replayed_efficiency
from tests.distributed.test_two_processes import RECIPE


def row_of(lengths: list[int]) -> ReplayRows:
    """Return a text that is decoded in rounds of these numbers of tokens, for certain."""
    flags = [flag for length in lengths for flag in [*([1.0] * (length - 1)), 0.0]]
    return ReplayRows("x", np.array(flags)[:, None], np.array(flags))


def test_the_interval_is_that_of_the_bootstrap_over_texts():
    """Of texts whose tokens and rounds are known."""
    generator = np.random.default_rng(0)
    texts = [list(generator.integers(1, 5, generator.integers(20, 30))) for _ in range(60)]
    # A text has easy or hard passages: its rounds go together.
    texts = [[min(4, int(length) + place % 3) for length in text] for place, text in enumerate(texts)]
    found = replayed_efficiency([row_of(text) for text in texts], 3)
    tokens, rounds = np.array([sum(text) for text in texts]), np.array([len(text) for text in texts])
    assert found.value == pytest.approx(tokens.sum() / rounds.sum())
    chosen = generator.integers(0, len(texts), (20_000, len(texts)))
    low, high = np.quantile(tokens[chosen].sum(1) / rounds[chosen].sum(1), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))
    # The control: an interval over rounds, as if each were a text of its own, is another one.
    over_rounds = ratio_interval([length for text in texts for length in text], [1] * int(rounds.sum()))
    assert over_rounds.high - over_rounds.low < 0.7 * (high - low)


def test_a_run_stores_the_interval_of_its_draft_length_with_each_validation(tmp_path: Path, save_llama: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(6)))
    path = tmp_path / "pair.yaml"
    path.write_text(RECIPE.format(target=save_llama(num_layers=2), prompts=prompts))
    drafter = "drafter={kind: causal_lm, num_layers: 1, hidden_size: 16, num_heads: 1}"
    recipe = load_recipe(path, [drafter, "train.max_steps=2", "train.eval_every_steps=2", "eval.temperatures=[1]"])
    run = DrafterRun(recipe, tmp_path / "run")
    write_texts(run)
    run.train()
    with (run.folder.train / "metrics.csv").open(newline="") as file:
        stored = [row for row in csv.DictReader(file) if row["validation_block_efficiency"]]
    assert len(stored) == 2
    length, texts = recipe.eval.length.chain_length, run.validation.texts
    rows = replay_rows(run.target, run.drafter.eval(), texts, run.validation.sampling, num_depths=length)
    tokens = [len(text.new) for text in texts]
    by_hand, other = (ratio_interval(tokens, [expected_rounds(row, k) for row in rows]) for k in (length, 1))
    names = ("block_efficiency", "block_efficiency_low", "block_efficiency_high")
    last = [float(stored[-1][f"validation_{name}"]) for name in names]
    assert last == pytest.approx([by_hand.value, by_hand.low, by_hand.high], rel=1e-4)
    assert by_hand.low < by_hand.value < by_hand.high
    assert last != pytest.approx([other.value, other.low, other.high], rel=1e-2), "another length"
