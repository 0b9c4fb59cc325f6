"""The logged distribution reaches the training step at the right positions, and the target does not run there."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.commands.fit import fit
from drafttrain.config.load import load_recipe
from drafttrain.core.target_rows import NamedTargetRows, TargetNeeds
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.training_data import TrainingData, attach_cache, prepare
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.losses.forward_kl import ForwardKL, ForwardKLSettings
from drafttrain.training.distill import DistillModule
from drafttrain.training.settings import TrainSettings
from tests.data_gen.serving_logs.log_lines import completion, ids, write

TOP_K = 5


@torch.no_grad()
def served(target: Any, prompt: str, *, count: int = 8) -> dict[str, Any]:
    """Return the log line of an answer that the target really wrote, with its largest log-probabilities."""
    tokens = ids(prompt)
    logged: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    for _ in range(count):
        log_p_V = target.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        best = log_p_V.topk(TOP_K)
        names = [f"token_id:{token}" for token in best.indices.tolist()]
        logged["tokens"].append(names[0])
        logged["token_logprobs"].append(best.values[0].item())
        logged["top_logprobs"].append(dict(zip(names, best.values.tolist(), strict=True)))
        tokens.append(int(best.indices[0]))
    choice = {"logprobs": logged, "token_ids": tokens[len(ids(prompt)) :], "message": {"content": None}}
    return completion(prompt, "", **choice)


@pytest.fixture
def data(tiny_target, tmp_path) -> TrainingData:
    """Two logged answers in one source, a text in another."""
    log = write(tmp_path / "log.jsonl", [served(tiny_target, prompt) for prompt in ("One", "Another one")])
    text = write(tmp_path / "text.jsonl", [{"text": "Some words without a distribution"}])
    sources = [ServingLogsSettings(path=str(log), redact=False), JSONLSettings(path=str(text))]
    return prepared(tmp_path, sources, tiny_target)


def prepared(folder: Any, sources: list[Any], target: Any) -> TrainingData:
    settings = DataSettings(sources=sources, max_length=64)
    return prepare(settings, folder / "d", tokenizer=target.tokenizer, tokenizer_fingerprint="x", seed=0)


def only_logs(data: TrainingData) -> TrainingData:
    settings = DataSettings(sources=data.settings.sources[:1], max_length=64, cache="top_k")
    return TrainingData(data.stores[:1], settings, data.encoder, seed=0)


def module(target: Any, read_by: Any) -> DistillModule:
    drafter = CausalLMDrafter.create(CausalLMSettings(), target=target, tokenizer=target.tokenizer)
    loss = ForwardKL(ForwardKLSettings())
    return DistillModule(drafter, loss, target=read_by, settings=TrainSettings(), vocab_size=target.num_tokens)


def test_the_logged_rows_are_the_targets_own_at_every_label(data, tiny_target):
    (batch,) = only_logs(data).of_step(0, batch_size=2)
    assert isinstance(batch.target_rows, NamedTargetRows)
    row_N, column_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    index_N = row_N * batch.tokens_BT.shape[1] + column_N - 1
    assert len(index_N) == 16
    seen = tiny_target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    log_p_NV = tiny_target.rows_of(seen).at(index_N).log_softmax(-1)
    named = batch.target_rows.named(index_N)
    best = log_p_NV.topk(TOP_K)
    assert (named.ids_NK.sort().values == best.indices.sort().values).all()
    torch.testing.assert_close(log_p_NV.gather(1, named.ids_NK), named.log_probs_NK, rtol=0, atol=1e-4)
    torch.testing.assert_close(named.tail_N, 1 - best.values.exp().sum(-1), rtol=0, atol=1e-4)
    spread_NV = batch.target_rows.at(index_N)
    torch.testing.assert_close(spread_NV.exp().sum(-1), torch.ones(16), rtol=0, atol=1e-4)
    # Control: one position earlier the distribution differs.
    assert not torch.allclose(tiny_target.rows_of(seen).at(index_N - 1).log_softmax(-1), log_p_NV, atol=0.1)


def test_a_micro_batch_of_logged_records_trains_without_the_target_and_a_mixed_one_runs_it(data, tiny_target):
    (logged,) = only_logs(data).of_step(0, batch_size=2)
    without = module(tiny_target, None)
    assert without._with_target(logged) is logged
    (mixed,) = data.of_step(0, batch_size=4)
    assert mixed.target_rows is None
    with pytest.raises(AssertionError, match="loads a target"):
        without._with_target(mixed)
    assert module(tiny_target, tiny_target)._with_target(mixed).target_rows is not None


def test_no_distribution_is_cached_where_the_log_has_it(data, tiny_target, tmp_path):
    only = only_logs(data)
    assert only.has_logged_distribution(num_records=4)
    assert not data.has_logged_distribution(num_records=4)
    attach_cache(only, tmp_path / "c", tiny_target, num_records=4, needs=TargetNeeds())
    assert only.caches == [None]
    attach_cache(only, tmp_path / "c", tiny_target, num_records=4, needs=TargetNeeds(final=True))
    (batch,) = only.of_step(0, batch_size=2)
    assert batch.target is not None
    assert batch.target.final_BTD is not None
    assert isinstance(batch.target_rows, NamedTargetRows)


def test_the_mass_of_the_tail_is_reported(data):
    about = data.stores[0].meta["logged_distribution"]
    distributions = data.stores[0].distributions
    assert distributions is not None
    logged = [one for one in (distributions[i] for i in range(2)) if one is not None]
    tails = np.concatenate([1 - np.exp(one.log_probs_NK).sum(axis=1) for one in logged])
    assert about["rows"] == 16
    assert np.isclose(about["mean_tail_mass"], tails.mean(), atol=1e-5)
    assert "logged_distribution" not in data.stores[1].meta


@pytest.mark.slow
def test_fit_goes_once_over_the_logs(tiny_target, tiny_folder, tmp_path):
    lines: list[Any] = [served(tiny_target, f"Prompt number {number} of all") for number in range(12)]
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "a.jsonl", [*lines, "no log", lines[0]])
    texts = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(texts))
    prompts = tmp_path / "prompts.jsonl"
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: logs
target: {{model: {tiny_folder}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: forward_kl}}
data: {{max_length: 64, sources: [{{kind: serving_logs, path: {tmp_path / "logs"}, redact: false}}]}}
train: {{max_steps: 6, warmup_steps: 1, batch_size: 4, log_every_steps: 1, eval_every_steps: 0, loggers: [csv]}}
eval: {{num_prompts: 2, max_new_tokens: 6, prompt_tokens: 6, speed_prompts: 1, prompts: {prompts},
       validation_prompts: {prompts}}}
"""
    )
    fit(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    (about,) = [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("meta.json")]
    assert (about["records"], about["set_aside_by"]) == (12, {"not_a_record": 1, "duplicate": 1})
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "drafter" / "config.json").exists()
