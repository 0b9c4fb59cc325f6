"""Drafting with the target's first blocks, its final norm and its head.

N = rows, D = hidden, V = the target's vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.proposals import Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import weights_of
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.few_rows import head_product
from drafttrain.drafters.first_blocks import FirstBlocksProposer
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm


class ExitHead:
    """The target's final norm and head, on states between its blocks. Every call is reported."""

    def __init__(self, target: Target, listener: ForwardListener | None) -> None:
        self._norm = final_norm(target.model)
        self._product = head_product(target.model)
        self._weights = weights_of(self._norm, target.model.get_output_embeddings())
        self._device = target.device
        self._listener = listener

    @torch.no_grad()
    def read(self, states_ND: Tensor, *, num_sequences: int, name: str) -> tuple[Tensor, Tensor]:
        """Return (normed_ND, logits_NV).

        Args:
            name: Of the call, in the ledger.
        """
        span, rows = Span(self._device), len(states_ND)
        normed_ND: Tensor = self._norm(states_ND)
        logits_NV = self._product(normed_ND)
        if self._listener is not None:
            shape = ForwardShape(rows, context=0, pairs=0, num_sequences=num_sequences, num_layers=0, head_rows=rows)
            self._listener(ForwardEvent(name, shape, self._weights.read(rows), span.end()))
        return normed_ND, logits_NV


class EarlyExitProposer(FirstBlocksProposer):
    """Drafts chains. It has no weights and no cache of its own.

    Args:
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature.

    Source: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710, section 4.3: self-speculative decoding.
    """

    kind = "early_exit"

    def __init__(
        self, target: Target, *, exit_layer: int, draft: str = "sampled", listener: ForwardListener | None = None
    ) -> None:
        vocabulary = DraftVocabulary(None, num_tokens=target.num_tokens)
        super().__init__(ChainDraft(vocabulary, target.vocab_size, draft), exit_layer=exit_layer)
        self._head = ExitHead(target, listener)

    def read(self, inputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Run the norm and the head."""
        last_ND = torch.stack([states[-1] for states in inputs if states])
        return self._head.read(last_ND, num_sequences=len(last_ND), name="drafter")

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Nothing is cached."""
