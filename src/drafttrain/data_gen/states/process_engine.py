"""An engine in a process of its own: a worker reads texts and leaves the states of each in a file.

L = layers, T = tokens, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.data_gen.states import TextStates
from drafttrain.data_gen.states.states_file import states_of_file
from drafttrain.environments.conversation import Conversation
from drafttrain.environments.environment import Environment


class ProcessEngine:
    """Starts a worker with the first texts; again if later ones are longer or other layers are read.

    Args:
        worker: What it is asked and answers is described in `vllm_worker.py`.
        request: The first request, without `layers` and `max_model_len`.
        max_length: Tokens of the longest text, as far as it is known.
    """

    def __init__(self, environment: Environment, worker: Path, request: Mapping[str, Any], *, max_length: int) -> None:
        self._environment = environment
        self._worker = worker
        self._request = request
        self._max_length = max_length
        self._layers: tuple[int, ...] = ()
        self._process: Conversation | None = None

    def read(self, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Iterator[TextStates]:
        """Yield the states of each text, in order.

        Raises:
            EngineError: The engine is not installed, or failed.
            DataError: It read other tokens than it was sent.
        """
        process = self._started(max(map(len, texts)), layers)
        columns = [self._layers.index(layer) for layer in layers]
        answers = process.ask({"texts": [list(map(int, text)) for text in texts]})["texts"]
        for text, answer in zip(texts, answers, strict=True):
            path = process.folder / answer["file"]
            yield states_of_file(path, text, columns, next_token=answer["next_token"])

    def close(self) -> None:
        """End the process; the next call of `read` starts another one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _started(self, longest: int, layers: Sequence[int]) -> Conversation:
        """Return a process for texts of this length and these layers."""
        if longest > self._max_length or not set(layers) <= set(self._layers):
            self.close()
        if self._process is None:
            self._max_length = max(longest, self._max_length)
            self._layers = tuple(sorted({*self._layers, *layers}))
            names = ", ".join(map(str, self._layers))
            say(f"{self._environment.name}: loads the target in its own process and returns hidden states {names}")
            # The token after a text counts.
            needs = {"layers": list(self._layers), "max_model_len": self._max_length + 1}
            self._process = Conversation(self._environment, self._worker, {**self._request, **needs})
        return self._process
