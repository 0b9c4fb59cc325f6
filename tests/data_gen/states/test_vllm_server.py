"""Hidden states from a server: in order, complete when they are read, and errors that name what the server lacks."""

from __future__ import annotations

import fcntl
import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.states.vllm_server import ServerEngine, VllmServerSource, VllmServerStates
from drafttrain.target_model import TargetSettings
from tests.data_gen.backends.completions_server import CompletionsServer, serving

NEEDS = TargetNeeds(hidden=(1,), final=True)
TOKENS_BT = torch.arange(1, 81).view(2, 40)
POSITIONS_BT = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)


@dataclass
class StatesServer(CompletionsServer):
    """Writes the states of each prompt after it has answered, as vLLM's connector does: it holds a lock meanwhile."""

    folder: Path = Path()
    layers: tuple[int, ...] = (1, 2)
    numbers: Any = field(default_factory=itertools.count)

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        answer = super()._answer(asked)
        if asked["max_tokens"] == 1:
            path = self.folder / f"{next(self.numbers)}.safetensors"
            prompt = list(asked["prompt"])
            needs = TargetNeeds(hidden=self.layers)
            seen = self.target.read(torch.tensor([prompt]), torch.arange(len(prompt))[None], needs)
            states_TLD = torch.stack([seen.hidden_BTD[layer][0] for layer in self.layers], dim=1)
            lock = Path(f"{path}.lock").open("w", encoding="utf-8")  # noqa: SIM115  the writer closes it
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = {"hidden_states": states_TLD.contiguous(), "token_ids": torch.tensor(prompt)}
            writer = threading.Thread(target=self._write, args=(path, lock, content))
            answer["kv_transfer_params"] = {"hidden_states_path": str(path)}
            writer.start()
        return answer

    @staticmethod
    def _write(path: Path, lock: Any, content: dict[str, torch.Tensor]) -> None:
        time.sleep(0.2)
        save_file(content, path)
        lock.close()


def source(url: str, *, layers: list[int] | None = None, model: str = "served") -> VllmServerSource:
    return VllmServerSource(VllmServerStates(url, model, layers or [1, 2], concurrency=3))


def settings(tiny_target: Any) -> TargetSettings:
    return TargetSettings(model=tiny_target.name)


def test_states_of_a_server_are_those_of_the_target_and_their_files_are_removed(tiny_target, tmp_path):
    server = StatesServer(tiny_target, folder=tmp_path)
    with serving(server) as url:
        theirs = source(url).target(settings(tiny_target), max_length=64, while_training=False)
        read, live = (target.read(TOKENS_BT, POSITIONS_BT, NEEDS) for target in (theirs, tiny_target))
    for one, other in ((read.final_BTD, live.final_BTD), (read.hidden_BTD[1], live.hidden_BTD[1])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert server.most_at_once <= 3
    assert not list(tmp_path.iterdir())


def test_a_server_of_other_layers_than_the_recipe_names_is_refused(tiny_target, tmp_path):
    with serving(StatesServer(tiny_target, folder=tmp_path, layers=(0, 1))) as url:
        theirs = source(url).target(settings(tiny_target), max_length=64, while_training=False)
        with pytest.raises(DataError, match="the engine runs another model, or returns other layers"):
            theirs.read(TOKENS_BT, POSITIONS_BT, NEEDS)


def test_its_texts_are_the_targets(tiny_target, tmp_path):
    tasks = [Task(str(n), list(range(n, n + 5)), Sampling()) for n in (1, 40)]
    with serving(StatesServer(tiny_target, folder=tmp_path)) as url:
        texts = source(url).continued(tasks, tiny_target, max_new_tokens=6, seed=0)
    assert texts == continuations(tasks, tiny_target, max_new_tokens=6, seed=0)


def test_a_missing_layer_is_reported_with_what_the_server_needs(tiny_target):
    engine = ServerEngine(VllmServerStates("http://127.0.0.1:9/v1", "served", [1, 3]))
    message = r"layers: \[1, 3\], and 0, 2 are needed too: .*\"eagle_aux_hidden_state_layer_ids\": \[0, 1, 2, 3\]"
    with pytest.raises(DataError, match=message):
        list(engine.read([[1]], [0, 2]))


def test_a_server_that_returns_no_states_or_writes_elsewhere_is_refused(tiny_target, tmp_path):
    with (
        serving(CompletionsServer(tiny_target)) as url,
        pytest.raises(DataError, match="it is not a vLLM server with method extract_hidden_states"),
    ):
        list(source(url).target(settings(tiny_target), max_length=9, while_training=False)._engine.read([[1]], [1]))

    class Elsewhere(CompletionsServer):
        def _answer(self, asked):
            return super()._answer(asked) | {"kv_transfer_params": {"hidden_states_path": "/nowhere/1.safetensors"}}

    with serving(Elsewhere(tiny_target)) as url, pytest.raises(DataError, match="this machine sees no such folder"):
        list(ServerEngine(VllmServerStates(url, "served", [1])).read([[1]], [1]))
    with serving(CompletionsServer(tiny_target)) as url, pytest.raises(DataError, match="serves no model 'other'"):
        list(ServerEngine(VllmServerStates(url, "other", [1])).read([[1]], [1]))


def test_bad_settings_are_reported_together():
    found = VllmServerStates("ftp://host", "served", [3, 1]).check()
    assert len(found) == 2
    assert "base_url: must begin with" in found[0]
    assert "layers: ascending numbers are needed, each once, got [3, 1]" in found[1]
