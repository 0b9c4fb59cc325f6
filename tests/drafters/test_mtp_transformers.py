"""transformers' own MTP generator drafts with a stitched DeepSeek layer: the same logits, the same text, the same rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Prompt
from drafttrain.drafters import drafters
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.serving.engines import Job
from drafttrain.serving.reference import evaluator_side
from drafttrain.target_model import Target
from tests.drafters.mtp_models import deepseek_folder, loaded
from tests.export import folders
from tests.export.trained import learn

PROMPTS = [Prompt(str(i), list(range(3 + i, 12 + 3 * i))) for i in range(4)]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Any]:
    """The stitched checkpoint as transformers loads it, and the drafter that was stitched into it."""
    folder: Path = tmp_path_factory.mktemp("deepseek")
    source = deepseek_folder(folder / "target")
    target = loaded(source, dtype="float32")
    entry: Any = drafters.entry("mtp")
    settings = entry.settings(engine="transformers", num_steps=1)
    drafter = entry.component.create(settings, target=target, tokenizer=target.tokenizer)
    learn(drafter, target, PROMPTS[:2], steps=30, new_tokens=NEW_TOKENS, lr=3e-3)
    folders.save(drafter, folder / "drafter", target)
    export_as("checkpoint", folder / "drafter", folder / "out", target_config=read_target_config(source, name="target"))
    stitched = loaded(folder / "out", dtype="float32")
    # transformers takes for the layer's tensors what the class ignores: those after the 61 blocks of the published model.
    stitched.model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]
    return stitched, read_drafter(folder / "drafter", target)


def their_logits(target: Target, tokens: list[int]) -> Tensor:
    """Return the logits of transformers' layer at the last slot of a text."""
    model = target.model
    with torch.no_grad():
        text = torch.tensor([tokens])
        hidden = model(text[:, :-1], output_hidden_states=True).hidden_states[-1]
        layer = MtpModel.from_pretrained(model)
        _, logits, _ = layer(
            input_ids=text[:, 1:],
            last_hidden_states=hidden,
            attention_mask=None,
            position_ids=torch.arange(1, len(tokens))[None],
            mtp_cache=MtpCache(config=model.config.get_mtp_config()),
        )
    return logits[0, 0]


def our_logits(drafter: Any, target: Target, tokens: list[int]) -> Tensor:
    """Return the drafter's logits of the same token: slot t pairs the state of token t with token t + 1."""
    text, at = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    with torch.no_grad():
        seen = target.read(text, at, drafter.needs())
        inputs, residual = drafter.entering(drafter.embed_at(text[:, 1:], at[:, :-1]), drafter.features(seen)[:, :-1])
        keys, values = drafter.layer.keys_and_values(inputs, at[:, :-1])
        query = drafter.layer.queries(inputs, at[:, :-1])
        later = torch.full((len(tokens) - 1, len(tokens) - 1), -torch.inf).triu(1)
        attended = (query @ keys.mT / query.shape[-1] ** 0.5 + later).softmax(-1) @ values
        return drafter.head(drafter.layer.finish(attended, residual)[0, -1:], 1)[0]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)
def test_their_layer_and_ours_have_the_same_logits(served, prompt):
    target, drafter = served
    tokens = list(prompt.tokens)
    torch.testing.assert_close(our_logits(drafter, target, tokens), their_logits(target, tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize("field", ["hidden_first", "zero_first"])
def test_control_another_order_or_a_zeroed_embedding_has_other_logits(served, field):
    target, drafter = served
    drafter.config[field] = not drafter.config[field]
    tokens = list(PROMPTS[1].tokens)
    difference = (our_logits(drafter, target, tokens) - their_logits(target, tokens)).abs().max()
    drafter.config[field] = not drafter.config[field]
    assert float(difference) > 0.05


@pytest.mark.long
def test_use_mtp_writes_the_same_text_in_the_same_rounds(served):
    """Its API shows no counters; the forwards of the target are the rounds."""
    target, drafter = served
    job = Job(Path(), [prompt.tokens for prompt in PROMPTS], NEW_TOKENS, [0.0, 0.0], "float32", 128)
    # Its first token comes before any draft, and the last round drafts past the end.
    ours = evaluator_side(target, drafter, PROMPTS, job, num_draft_tokens=1).greedy
    plain, texts, rounds = [], [], []
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.tokens)])
        given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        forwards: list[int] = []
        handle = target.model.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        texts.append(target.model.generate(ids, use_mtp=True, **given)[0, ids.shape[1] :].tolist())
        handle.remove()
        rounds.append(len(forwards))
        plain.append(target.model.generate(ids, **given)[0, ids.shape[1] :].tolist())
    assert texts == plain == [one.tokens for one in ours]
    assert rounds == [1 + one.num_drafts for one in ours]
    assert sum(rounds) < len(PROMPTS) * NEW_TOKENS - 4, "drafts are accepted"
