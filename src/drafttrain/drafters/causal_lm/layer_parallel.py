"""EasySpec: while it drafts, a language model runs the attention of several layers on the same states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.roles import ForwardListener
from drafttrain.drafters.causal_lm.decoding import PLAIN_MODELS, DecodingLayer, DecodingLM, decoding_lm, is_plain
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.ragged_cache import Tree

FEWEST_LAYERS = 4
"""The first and the last layer always run alone, and a group needs two more."""


class LayerParallelLM(DecodingLM):
    """A `DecodingLM` whose layers run in groups while it drafts, so that several devices could share a group.

    Attention of all layers of a group reads the states that enter the group. Their feed-forward blocks run in order, each with the
    attention of its own layer added. The first and the last layer run alone.

    After `keep`, the first call reads committed tokens, and runs layer by layer. Calls after it read draft tokens, in groups, and
    `keep` drops what they wrote: the first call of the next round reads accepted tokens again. So keys and values of committed tokens
    are always those of ordinary calls, and so is the distribution of the first draft token.

    Args:
        size: Most layers of a group; 1: every call runs layer by layer, but accepted tokens are read again.

    Raises:
        CheckpointError: The model has too few layers, or is not one that `DecodingLM` computes.

    Source: Wu et al. 2025, EasySpec, arXiv 2502.02493: fuzzy speculation, and bonus calibration.
    """

    def __init__(self, model: Any, size: int, *, name: str, listener: ForwardListener | None = None) -> None:
        check_layer_parallel(model)
        super().__init__(model, name=name, listener=listener)
        inner = self._layers[1:-1]
        together = [inner[start : start + size] for start in range(0, len(inner), size)]
        self._drafting = [self._layers[:1], *together, self._layers[-1:]]
        self._exact: list[int] | None = None
        """Tokens in the cache by sequence before the first call that read draft tokens; None: there was none since `keep`."""

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of each sequence's pending tokens that are committed ones, and drop all draft tokens."""
        if self._exact is not None:
            nodes = [
                [node for node in chosen if kept + node < exact]
                for kept, exact, chosen in zip(self.kept, self._exact, nodes, strict=True)
            ]
        super().keep(nodes)
        self._exact = None

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each sequence, and no draft tokens."""
        super().cut([min(pair) for pair in zip(lengths, self._exact or self.lengths, strict=True)])
        self._exact = None

    def _stream(
        self,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Tree] | None,
        embedded: Sequence[Tensor] | None,
        *,
        width: int,
    ) -> Tensor:
        self._exact = None if self.lengths == self.kept else self._exact or list(self.lengths)
        return super()._stream(tokens, parents, embedded, width=width)

    def _groups(self) -> list[list[DecodingLayer]]:
        return super()._groups() if self._exact is None else self._drafting


def drafting_lm(
    model: Any, *, layer_parallel_size: int = 1, listener: ForwardListener | None = None
) -> DecodingLM | CachedLM:
    """Return a drafter's language model as it drafts: with layers in parallel if their number is above 1."""
    if layer_parallel_size == 1:
        return decoding_lm(model, listener=listener)
    return LayerParallelLM(model, layer_parallel_size, name="drafter", listener=listener)


def check_layer_parallel(model: Any) -> None:
    """Refuse a model whose layers cannot run in groups.

    Raises:
        CheckpointError: Why.
    """
    problem = class_problem(type(model).__name__) or layer_problem(model.config.num_hidden_layers)
    if problem is None and not is_plain(model):
        problem = "the drafter's attention, rotary angles, activation or a changed module is not that of a plain Llama"
    if problem is not None:
        raise CheckpointError(f"eval.layer_parallel_size: {problem}. Set 1")


def layer_problem(num_layers: int) -> str | None:
    """Return why no layers of so many can run in parallel; None: some can."""
    if num_layers >= FEWEST_LAYERS:
        return None
    return (
        f"the first and the last layer run alone, so a drafter needs at least {FEWEST_LAYERS} layers, got {num_layers}"
    )


def class_problem(name: str) -> str | None:
    """Return why layers of a model of this class cannot run in parallel here; None: they can."""
    return None if name in PLAIN_MODELS else f"the drafter must be a {', '.join(PLAIN_MODELS)}, got {name}"
