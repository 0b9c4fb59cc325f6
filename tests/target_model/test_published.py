"""The sizes that come with drafttrain give the numbers of weights that the makers of the models published."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.folders import PUBLISHED, config_folder
from drafttrain.target_model.sized_target import read_sizes, sized_model

WEIGHTS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "known:smollm2": 134_515_008,
    "known:gemma3": 268_098_176,
    # The language model: with the tower's 303,507,456 and the projector's 20,979,712 the published 7,063,427,072.
    "llava-hf/llava-1.5-7b-hf": 6_738_939_904,
}


@pytest.mark.parametrize(("name", "weights"), WEIGHTS.items())
def test_a_model_of_the_published_sizes_has_the_published_number_of_weights(name: str, weights: int) -> None:
    config, folder = read_sizes(name)
    assert folder.parent == PUBLISHED
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = sized_model(config, "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == weights


def test_another_revision_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="fetching it from the hub failed"):
        config_folder("Qwen/Qwen3-8B", revision="main")
