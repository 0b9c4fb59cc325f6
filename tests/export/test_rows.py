"""A drafter whose vocabulary is padded differently from its target's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafttrain.core.foreign import read_json
from drafttrain.export.convert import export_as

TOKENS_BT = torch.tensor([[5, 200, 33, 7]])


@pytest.mark.parametrize("format", ["vllm", "sglang"])
@pytest.mark.parametrize("rows", [257, 300, 320, 384])
@torch.no_grad()
def test_a_plain_lm_gets_the_rows_of_its_target(
    save_llama: Callable[..., Path], tmp_path: Path, format: str, rows: int
) -> None:
    drafter, target = save_llama(num_layers=1, vocab_size=320), save_llama(num_layers=1, seed=1, vocab_size=rows)
    export_as(format, drafter, tmp_path / "out", target_config=read_json(target / "config.json"))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (drafter, tmp_path / "out"))
    assert theirs.get_input_embeddings().weight.shape[0] == rows
    logits_BTV, padded_BTV = ours(TOKENS_BT).logits, theirs(TOKENS_BT).logits
    assert padded_BTV.shape[-1] == rows
    common = min(rows, 320)
    torch.testing.assert_close(padded_BTV[..., :common], logits_BTV[..., :common])
    assert not padded_BTV[..., common:].any()
