"""An engine in its own process: one start for many texts, another one for more, and no file that is not of its text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.data_gen.states.process_engine import ProcessEngine
from drafttrain.environments.environment import EngineError, Environment

WORKER = """
import os
import numpy
from safetensors.numpy import save_file

def start(request):
    with open(request["log"], "a") as log:
        log.write(f"{os.getpid()} {request['max_model_len']} {request['layers']}\\n")
    number = 0

    def states(asked):
        nonlocal number
        found = []
        for text in asked["texts"]:
            assert len(text) < request["max_model_len"], "too long"
            tokens, layers = numpy.array(text), numpy.array(request["layers"])
            content = {"hidden_states": (tokens[:, None] + 1000.0 * layers)[:, :, None] + numpy.zeros(4), "token_ids": tokens}
            content.update({"tokens": {"token_ids": tokens + 1}}.get(request["wrong"], {}))
            content.pop(request["wrong"], None)
            number += 1
            save_file(content, f"{number}.safetensors")
            found.append({"file": f"{number}.safetensors", "next_token": text[-1] + 1})
        return {"texts": found}

    return states
"""
"""The state of a token is its number, plus 1,000 times the layer."""


class Engines:
    """Engines in one folder, and the log of their starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[ProcessEngine] = []
        (folder / "worker.py").write_text(WORKER)

    def engine(self, *, max_length: int = 9, wrong: str = "") -> ProcessEngine:
        """Return an engine that is not started yet."""
        request = {"log": str(self._folder / "log"), "wrong": wrong}
        self._made.append(
            ProcessEngine(Environment("here"), self._folder / "worker.py", request, max_length=max_length)
        )
        return self._made[-1]

    @property
    def starts(self) -> list[list[str]]:
        """Process, longest text and layers of each start."""
        log = self._folder / "log"
        return [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []

    def close(self) -> None:
        """End all processes."""
        for engine in self._made:
            engine.close()


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    made = Engines(tmp_path)
    yield made
    made.close()


def first(read: Any) -> list[list[float]]:
    """Return the first number of each state, by text, tokens then layers."""
    return [one.layers_TLD[:, :, 0].flatten().tolist() for one in read]


def test_texts_come_back_in_order_with_the_layers_in_the_order_of_the_request(engines: Engines) -> None:
    engine = engines.engine()
    read = list(engine.read([[1, 2], [7]], [3, 0]))
    assert first(read) == [[3001, 1, 3002, 2], [3007, 7]]
    assert [one.next_token for one in read] == [3, 8]
    assert read[0].layers_TLD.shape == torch.Size([2, 2, 4])
    assert first(engine.read([[5]], [3])) == [[3005]]


def test_it_starts_with_the_first_text_and_again_for_longer_texts_or_other_layers(engines: Engines) -> None:
    engine = engines.engine(max_length=3)
    assert not engines.starts
    for layers in ([1, 2], [2], [1]):
        list(engine.read([[1, 2, 3]], layers))
    assert [start[1:] for start in engines.starts] == [["4", "[1, 2]"]]
    for layers in ([4], [1, 2, 4]):
        list(engine.read([[1]], layers))
    assert [start[1:] for start in engines.starts[1:]] == [["4", "[1, 2, 4]"]]
    assert first(engine.read([[1] * 5], [4])) == [[4001] * 5]
    assert [start[1:] for start in engines.starts[2:]] == [["6", "[1, 2, 4]"]]
    alive = [Path(f"/proc/{start[0]}").exists() for start in engines.starts]
    assert alive == [False, False, True]
    engine.close()
    assert not Path(f"/proc/{engines.starts[2][0]}").exists()
    list(engine.read([[1]], [1]))
    assert engines.starts[3][1:] == engines.starts[2][1:], "it starts again as it was"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tokens", r"states of other tokens than were sent: \[2, 3\]\.\.\., not \[1, 2\]"),
        ("token_ids", r"no states of a text: KeyError: 'token_ids'"),
        ("hidden_states", r"no states of a text: KeyError: 'hidden_states'"),
    ],
)
def test_a_file_of_something_else_is_refused(engines: Engines, wrong: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(engines.engine(wrong=wrong).read([[1, 2]], [0]))


def test_an_engine_that_fails_shows_its_error(engines: Engines) -> None:
    with pytest.raises(EngineError, match=r"here failed: \w*Error: "):
        list(engines.engine().read([[1]], ["one"]))  # type: ignore[list-item]
