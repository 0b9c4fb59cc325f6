"""Completes lines with a controller, greedily: the loop over tokens and segments of the target's blocks.

D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.random import stream
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.few_rows import head_product
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.stop_exit.controllers import Controller
from drafttrain.eval.stop_exit.labels import Action
from drafttrain.eval.stop_exit.lines import Case, Lines
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.segments import SegmentedLM


@dataclass(frozen=True)
class Completion:
    """One completion and what it cost."""

    id: str
    tokens: Sequence[int]
    stopped_at: int | None
    """The layer that stopped it: nothing is shown; None: it was finished."""
    decisions: Mapping[int, Mapping[Action, int]]
    """By layer: how often each action was decided."""
    forwards: Sequence[ForwardEvent]
    """All calls, that of the prompt included."""

    @property
    def layer_passes(self) -> int:
        """Calls of a block, on whatever number of tokens; the prompt's are left out."""
        return sum(event.shape.num_layers for event in self.forwards if not event.prefill)

    @property
    def layer_rows(self) -> int:
        """Tokens through blocks; the prompt's are left out."""
        return sum(event.shape.num_layers * event.shape.num_tokens for event in self.forwards if not event.prefill)


class Completer:
    """Completes a line up to the token that ends it.

    Every new token, and the prompt's last one, runs the first segment; then the controller lets it go on to the next, exit with the
    shared head's likeliest token, or stop the completion. Blocks that a token skipped read it in the same call as the first later
    token that needs them (`SegmentedLM`), so a right exit changes nothing that follows.

    Args:
        layers: Numbers of blocks after which the controller decides.
    """

    def __init__(self, target: Target, lines: Lines, *, layers: Sequence[int], max_tokens: int, seed: int = 0) -> None:
        self._ledger = Ledger()
        self._target, self._lines, self._layers = target, lines, list(layers)
        self._max_tokens, self._seed = max_tokens, seed
        self._lm = SegmentedLM(target.model, boundaries=layers, name="target", listener=self._ledger.append)
        self._norm, self._head = final_norm(target.model), head_product(target.model)
        self._weights = weights_of(self._norm), weights_of(target.model.get_output_embeddings())
        self._ends = frozenset(target.eos_token_ids)

    @torch.no_grad()
    def complete(self, case: Case, controller: Controller) -> Completion:
        """Complete one case."""
        before, tokens = len(self._ledger.events), list[int]()
        decisions = {layer: dict.fromkeys(Action, 0) for layer in self._layers}
        controller.begin(stream(self._seed, "controller", case.id))
        self._lm.start(case.context[:-1])
        stopped_at, entering = None, case.context[-1]
        while len(tokens) < self._max_tokens and stopped_at is None:
            self._lm.add(entering)
            new, stopped_at = self._next(controller, decisions)
            if new is None:
                break
            tokens.append(new)
            if new in self._ends or bool(self._lines.ends_V[new]):
                break
            entering = new
        return Completion(case.id, tokens, stopped_at, decisions, self._ledger.events[before:])

    def _next(self, controller: Controller, decisions: dict[int, dict[Action, int]]) -> tuple[int | None, int | None]:
        """Return the next token, and the layer that stopped the completion in its place."""
        for number, layer in enumerate(self._layers):
            span, normed_D = Span(self._target.device), self._norm(self._lm.run(number))
            action = controller.decide(layer, normed_D)
            self._report("controller", self._weights[0] + controller.reads(layer), span)
            decisions[layer][action] += 1
            if action is Action.STOP:
                return None, layer
            if action is Action.EXIT:
                span, logits_V = Span(self._target.device), self._head(normed_D[None])[0]
                self._report("exit", self._weights[1], span, head_rows=1)
                return self._argmax(logits_V), None
        return self._argmax(self._lm.run(len(self._layers))), None

    def _argmax(self, logits_V: Tensor) -> int:
        return int(logits_V[: self._target.num_tokens].argmax())

    def _report(self, name: str, weights: Weights, span: Span, *, head_rows: int = 0) -> None:
        shape = ForwardShape(1, context=0, pairs=0, num_sequences=1, num_layers=0, head_rows=head_rows)
        self._ledger.append(ForwardEvent(name, shape, weights.read(1), span.end()))
