"""Transformers' own DFlash generator loads the export, and drafts the very tokens that the evaluator's proposer drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.export.convert import check_exported, export_as
from tests.export import folders
from tests.export.trained import learn

PROMPTS = [[7, 8, 9, 10, 11], [40, 3, 200, 17], [5, 6]]
NEW = 24


@pytest.fixture(scope="module")
def learned(target: Any) -> Any:
    """A drafter that has learned two of the texts."""
    drafter = folders.drafter_of("dflash", target, scale=0.1)
    prompts = [Prompt(str(i), tokens) for i, tokens in enumerate(PROMPTS[:2])]
    return learn(drafter, target, prompts, steps=60, new_tokens=NEW, lr=5e-3)


@pytest.fixture(scope="module")
def exported(learned: Any, target: Any, target_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    source = folders.save(learned, folder / "drafter", target)
    export_as("transformers", source, folder / "out", target_config=target_config)
    check_exported("transformers", source, folder / "out", target_config=target_config)
    return folder / "out"


def generated(target: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[Any]]:
    """Return (the text of each prompt, (text so far, drafted tokens) of each round) of transformers' generator."""
    assistant = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(target.name, dtype=torch.float32).eval()
    rounds, candidates = [], DFlashTokenCandidateGenerator.get_candidates

    def noted(self: Any, input_ids: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        found, logits = candidates(self, input_ids, *arguments, **more)
        if found.shape[1] > input_ids.shape[1]:
            rounds.append((input_ids[0].tolist(), found[0, input_ids.shape[1] :].tolist()))
        return found, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", noted)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, speculation_type="dflash")
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=assistant
        )
        texts.append(output[0, len(prompt) : len(prompt) + NEW].tolist())
    return texts, rounds


def drafted(target: Any, drafter: Any, tokens: list[int]) -> list[int]:
    """Return what the evaluator's proposer drafts after a text."""
    proposer, count = drafter.proposer(target), drafter.num_depths
    text = torch.tensor([tokens[:-1]])
    seen = target.read(text, torch.arange(text.shape[1])[None], drafter.needs())
    proposer.begin([Context("0", list(tokens), len(tokens))], [seen])
    (proposal,) = proposer.propose([Budget(count, count)], Sampling(), [torch.Generator()], lambda step: True)
    return proposal.tokens_N[1:].tolist()


def test_it_drafts_the_same_tokens_and_writes_the_targets_text(target, learned, exported, monkeypatch):
    texts, rounds = generated(target, exported, monkeypatch)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([prompt])
        plain = target.model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert text == plain[0, len(prompt) :].tolist()
    assert len(rounds) < len(PROMPTS) * (NEW - 1), "some drafts are accepted"
    assert [theirs for _, theirs in rounds] == [drafted(target, learned, tokens) for tokens, _ in rounds]


def test_control_a_layer_id_that_is_off_by_one_drafts_other_tokens(target, learned, exported, monkeypatch):
    path = exported / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["target_layer_ids"] == [tap - 1 for tap in learned.taps]
    wrong = {**config, "target_layer_ids": [1 + one for one in config["target_layer_ids"]]}
    path.write_text(json.dumps(wrong), encoding="utf-8")
    try:
        _, rounds = generated(target, exported, monkeypatch)
    finally:
        path.write_text(json.dumps(config), encoding="utf-8")
    assert [theirs for _, theirs in rounds] != [drafted(target, learned, tokens) for tokens, _ in rounds]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"causal": True}, "causal"),
        ({"draft_vocab_size": 100}, "lm_head"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
    ],
)
def test_what_the_generator_lacks_is_refused(source, target_config, tmp_path, settings, named):
    with pytest.raises(CheckpointError, match=named):
        export_as("transformers", source("dflash", **settings), tmp_path / "out", target_config=target_config)
