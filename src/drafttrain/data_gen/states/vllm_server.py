"""Hidden states by a running vLLM server that writes them into a folder which this machine sees.

L = layers, T = tokens, D = hidden
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.openai import EXTENSIONS, OpenAI, OpenAISettings
from drafttrain.data_gen.openai_client import Completions, NotAnswered, Patience, key_from
from drafttrain.data_gen.states import TextStates, states
from drafttrain.data_gen.states.engine_target import EngineTarget
from drafttrain.data_gen.states.engine_texts import continued_by
from drafttrain.data_gen.states.states_file import states_of_file
from drafttrain.target_model import Target
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.settings import TargetSettings

RETRIES, BACKOFF_SECONDS, LONGEST_WAIT_SECONDS = 5, 1.0, 600.0
BATCH_SIZE = 64


@dataclass
class VllmServerStates:
    """A vLLM server of the target computes them, and writes them into a folder that this machine sees too."""

    base_url: str = setting(help="Address with the version of the protocol, such as http://127.0.0.1:8000/v1.")
    model: str = setting(help="The target's name on the server.")
    layers: list[int] = setting(
        help="The states that the server returns: its eagle_aux_hidden_state_layer_ids, ascending. State i enters block i; the "
        "number of blocks: after the last one.",
        ge=0,
    )
    api_key_variable: str | None = setting(
        None, help="Environment variable with the API key; null: no key is sent. Never write the key into a recipe."
    )
    concurrency: int = setting(16, help="Requests in flight, by process.", ge=1)
    timeout_seconds: float = setting(600.0, help="Time limit of one answer.", gt=0)

    def check(self) -> list[str]:
        """Return problems between fields."""
        problems = OpenAISettings(self.base_url, self.model).check()
        if not self.layers or self.layers != sorted(set(self.layers)):
            problems.append(f"layers: ascending numbers are needed, each once, got {self.layers}")
        return problems


class ServerEngine:
    """Requests one token after each text from a server that was started elsewhere."""

    def __init__(self, settings: VllmServerStates) -> None:
        self._settings = settings
        self._key = key_from(settings.api_key_variable, named_by="data.states.api_key_variable")

    def read(self, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Iterator[TextStates]:
        """Yield the states of each text, in order.

        Raises:
            DataError: The server does not return these layers, is gone, refuses a text, or wrote no file that is seen here.
        """
        own = self._settings.layers
        if not set(layers) <= set(own):
            needed = sorted({*own, *layers})
            raise DataError(
                f"data.states.layers: {own}, and {', '.join(map(str, sorted(set(layers) - set(own))))} are needed too: start the "
                f"server with {json.dumps(speculative_config(needed))}, and set data.states.layers: {needed}"
            )
        columns = [own.index(layer) for layer in layers]
        for text, answer in zip(texts, asyncio.run(self._answers(texts)), strict=True):
            path, token = _file_and_token(answer)
            yield _complete(path, text, columns, token)

    def close(self) -> None:
        """Leave the server as it is."""

    async def _answers(self, texts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        chosen = self._settings
        patience = Patience(RETRIES, BACKOFF_SECONDS, LONGEST_WAIT_SECONDS, chosen.timeout_seconds)
        free = asyncio.Semaphore(chosen.concurrency)
        async with Completions(chosen.base_url, self._key, patience) as server:
            await server.check_model(chosen.model)

            async def one(text: Sequence[int]) -> dict[str, Any]:
                tokens = list(map(int, text))
                request = {"model": chosen.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, **EXTENSIONS}
                try:
                    async with free:
                        return (await server.complete(request))[0]
                except NotAnswered as reason:
                    raise DataError(
                        f"data.states: {chosen.base_url}: no states of a text of {len(tokens)} tokens: {reason}"
                    ) from reason

            return await asyncio.gather(*map(one, texts))


def speculative_config(layers: Sequence[int]) -> dict[str, Any]:
    """Return the speculative configuration of a server that returns these layers."""
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
    }


def _file_and_token(answer: dict[str, Any]) -> tuple[Path, int]:
    """Return where the server wrote the states, and the next token.

    Raises:
        DataError: The answer has neither.
    """
    try:
        return Path(answer["kv_transfer_params"]["hidden_states_path"]), int(answer["choices"][0]["token_ids"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            "data.states: the server's answer names no file of hidden states (kv_transfer_params.hidden_states_path), or no token id: "
            "it is not a vLLM server with method extract_hidden_states and ExampleHiddenStatesConnector"
        ) from error


def _complete(path: Path, text: Sequence[int], columns: Sequence[int], token: int) -> TextStates:
    """Return states when the server has written them: it holds a lock until then."""
    if not path.parent.is_dir():
        raise DataError(f"data.states: {path.parent}: the server writes there, and this machine sees no such folder")
    lock = Path(f"{path}.lock")
    with contextlib.suppress(FileNotFoundError):
        with lock.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        lock.unlink()
    return states_of_file(path, text, columns, next_token=token)


@states.register("vllm_server", VllmServerStates)
class VllmServerSource:
    """The target's blocks are in a server."""

    elsewhere = True

    def __init__(self, settings: VllmServerStates) -> None:
        self.settings = settings

    def target(self, settings: TargetSettings, *, max_length: int, while_training: bool) -> AbsentTarget:
        """Return a target whose blocks run in the server."""
        del max_length
        engine = ServerEngine(self.settings)
        return EngineTarget(AbsentTarget.load(settings), settings, engine, while_training=while_training)

    def continued(
        self,
        tasks: Sequence[Task],
        target: Target,
        *,
        max_new_tokens: int,
        seed: int,
        written: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the target's continuations by the server."""
        own = self.settings
        connection: dict[str, Any] = {
            "api_key_variable": own.api_key_variable,
            "concurrency": own.concurrency,
            "timeout_seconds": own.timeout_seconds,
        }
        settings = OpenAISettings(own.base_url, own.model, **connection)
        return continued_by(
            lambda plan: OpenAI(settings, plan),
            tasks,
            target,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=BATCH_SIZE,
            written=written,
        )
