"""A target whose blocks run in an engine, in another process or on another machine.

B = sequences, T = positions, L = layers, D = hidden, N = texts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.errors import DataError
from drafttrain.core.images import PlacedImages
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.data_gen.states import StatesEngine
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.logits import head_logits
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target

AGREEMENT = 0.5
"""Least share of texts whose next token must be the same by the engine and by the head here; rounding moves near ties."""

MOST_AHEAD = 64
"""Micro-batches whose states are here before they are asked for, at most. Those after them are read when they are asked for."""

Text = tuple[int, ...]


class EngineTarget(AbsentTarget):
    """Embedding, final norm and head are here; an engine returns the residual streams.

    Args:
        while_training: The training reads it in every step, so the engine is not released before.
    """

    elsewhere = True

    def __init__(
        self, target: AbsentTarget, settings: TargetSettings, engine: StatesEngine, *, while_training: bool
    ) -> None:
        super().__init__(settings, target.model, target.tokenizer, fingerprint=target.fingerprint)
        self._engine = engine
        self._while_training = while_training
        self._compared = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="states")
        # The loader's thread reads ahead, the training's thread reads.
        self._lock = Lock()
        self._ahead: dict[tuple[Any, ...], Future[dict[Text, Tensor]]] = {}

    @contextmanager
    def for_own_share(self) -> Iterator[Target]:
        """Yield this target: each process has its own connection to an engine."""
        yield self

    def release(self) -> None:
        """Release the engine, unless the training reads it."""
        if not self._while_training:
            self._engine.close()

    def read_ahead(self, tokens_BT: Tensor, positions_BT: Tensor, needs: TargetNeeds) -> None:
        """Let the engine read a batch while this process does something else, such as the step before it."""
        asked = _Asked(_documents(tokens_BT, positions_BT), self._layers(needs))
        with self._lock:
            if asked.key not in self._ahead and len(self._ahead) < MOST_AHEAD:
                self._ahead[asked.key] = self._reader.submit(self._states, asked)

    @torch.no_grad()
    def read(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        needs: TargetNeeds,
        *,
        documents: PackedDocuments | None = None,
        images: Sequence[PlacedImages] = (),
    ) -> TargetOutput:
        """Return the engine's states of the documents in packed rows; the final state by the norm here, from the last one.

        Raises:
            DataError: The engine computed other shapes than were requested, or its states do not belong to this head.
        """
        assert not images, "a recipe with target.images and an engine is refused"
        del documents
        layers, last = self._layers(needs), len(blocks(self.model))
        if not layers:
            return TargetOutput()
        asked = _Asked(_documents(tokens_BT, positions_BT), layers)
        with self._lock:
            read = self._ahead.pop(asked.key, None)
        states = (read or self._reader.submit(self._states, asked)).result()
        width = int(self.model.get_output_embeddings().weight.shape[1])
        read_BTLD = torch.zeros(*tokens_BT.shape, len(layers), width, dtype=self.model.dtype)
        for row, begin, text in asked.places:
            read_BTLD[row, begin : begin + len(text)] = states[text]
        by_layer = {layer: read_BTLD[:, :, place].to(self.device) for place, layer in enumerate(layers)}
        final_BTD = logits_BTV = None
        if needs.final or needs.logits:
            final_BTD = final_norm(self.model)(by_layer[last])
            logits_BTV = head_logits(self.model, final_BTD) if needs.logits else None
        return TargetOutput(
            logits_BTV=logits_BTV,
            hidden_BTD={index: by_layer[index % (last + 1)] for index in needs.hidden},
            final_BTD=final_BTD if needs.final else None,
        )

    def _layers(self, needs: TargetNeeds) -> tuple[int, ...]:
        """Return the states to request, ascending; the last one gives the final state."""
        last = len(blocks(self.model))
        top = {last} if needs.final or needs.logits else set()
        return tuple(sorted({index % (last + 1) for index in needs.hidden} | top))

    @torch.no_grad()
    def _states(self, asked: _Asked) -> dict[Text, Tensor]:
        """Return layers_TLD of each text. Runs in the reader's thread, which alone talks to the engine.

        Raises:
            DataError: See `read`.
        """
        texts, layers = list(dict.fromkeys(text for *_, text in asked.places)), asked.layers
        found, tops, tokens = dict[Text, Tensor](), [], []
        width = int(self.model.get_output_embeddings().weight.shape[1])
        for text, states in zip(texts, self._engine.read(texts, layers), strict=True):
            shape = (len(text), len(layers), width)
            if states.layers_TLD.shape != shape:
                raise DataError(
                    f"data.states: the engine returned states of shape {list(states.layers_TLD.shape)} for a text of {len(text)} "
                    f"tokens, expected {list(shape)}: the layers {', '.join(map(str, layers))} of width {width}"
                )
            found[text] = states.layers_TLD.to(self.model.dtype)
            tops.append(found[text][-1, -1])
            tokens.append(states.next_token)
        if not self._compared and layers[-1] == len(blocks(self.model)):
            self._check_head(torch.stack(tops), torch.tensor(tokens))
        return found

    def _check_head(self, last_ND: Tensor, token_N: Tensor) -> None:
        """Compare the likeliest tokens by the head here with the engine's, once: another model, or other layers, disagree.

        Raises:
            DataError: They differ.
        """
        final_ND = final_norm(self.model)(last_ND.to(self.device))
        own_N = head_logits(self.model, final_ND)[:, : self.num_tokens].argmax(-1).cpu()
        same = float((own_N == token_N).float().mean())
        if same < AGREEMENT:
            raise DataError(
                f"data.states: on {len(token_N)} texts the engine's next token is the likeliest one by {self.name}'s head for "
                f"{same:.0%}, at least {AGREEMENT:.0%} are expected: the engine runs another model, or returns other layers"
            )
        self._compared = True


@dataclass(frozen=True)
class _Asked:
    """What is requested for a batch."""

    places: list[tuple[int, int, Text]]
    """Row, first column and tokens of each document."""
    layers: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal requests."""
        return (self.layers, *self.places)


def _documents(tokens_BT: Tensor, positions_BT: Tensor) -> list[tuple[int, int, Text]]:
    """Return row, first column and tokens of each document."""
    found = []
    for row, (tokens, positions) in enumerate(zip(tokens_BT.tolist(), positions_BT.tolist(), strict=True)):
        begins = [column for column, position in enumerate(positions) if position == 0]
        ends = [*begins[1:], len(tokens)]
        found += [(row, begin, tuple(tokens[begin:end])) for begin, end in zip(begins, ends, strict=True)]
    return found
