"""The selector of DFlash2: a score of each pair of a slot's candidate and the token before it, and the loss that trains it.

A = blocks, K = draft tokens of a block, D = hidden, R = rank, N = rows, W = width of the drafter's head, k = candidates of a slot
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss

STD = 0.02
"""Of the initial codebook of the tokens before."""

RECALL = "candidate_recall"


class CandidateSelector(nn.Module):
    """S(b) = U(b) + <A[token before] * (H h), B[b]> for the candidates b of a slot: the k tokens with the largest logits U.

    It is a `Walk` without a state: f = A[token before] * (H h). B is zero at first, so that training starts from S = U. The codebooks
    are plain parameters, because published checkpoints name them without `.weight`.

    Source: DFlash 2, as in NeMo Automodel (`CandidateSelector`) and vLLM.
    """

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.predecessor_codebook = nn.Parameter(STD * torch.randn(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def forward(self, base_NW: Tensor, factor_NR: Tensor, *, num_tokens: int) -> Tensor:
        """Return logits_NW: S of the candidates, -inf for all other tokens. float32 or wider.

        Args:
            num_tokens: The tokens that can be drafted are the first ones.
        """
        best = base_NW[..., :num_tokens].topk(min(self.top_k, num_tokens), dim=-1)
        wide = torch.promote_types(base_NW.dtype, torch.float32)
        pairs_Nk = torch.einsum("...r,...kr->...k", factor_NR, embedding(best.indices, self.successor_codebook))
        scores_Nk = best.values.to(wide) + pairs_Nk.to(wide)
        return torch.full_like(base_NW, -torch.inf, dtype=wide).scatter(-1, best.indices, scores_Nk)

    def embed(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return A of tokens, given as the target's ids."""
        return embedding(tokens, self.predecessor_codebook).to(dtype)

    def start(self, hidden_AD: Tensor) -> Tensor:
        """Return the state before the first token of a block, which has no entries."""
        return hidden_AD.new_zeros(len(hidden_AD), 0)

    def step(self, place: int, hidden_AD: Tensor, embedded_AR: Tensor, state_A0: Tensor) -> tuple[Tensor, Tensor]:
        """Return (factor_AR, state_A0) of a slot."""
        return self.factors(hidden_AD, embedded_AR), state_A0

    def factors(self, hidden_AKD: Tensor, embedded_AKR: Tensor) -> Tensor:
        """Return factor_AKR of all slots."""
        factors_AKR: Tensor = embedded_AKR * self.hidden_projection(hidden_AKD)
        return factors_AKR


class CandidateCrossEntropy(Loss):
    """-log q(label) over the candidates, nats; 0 where the label is no candidate, since then there is nothing to select.

    Figures: `candidate_recall`, the share of the rows whose label is a candidate.
    """

    needs_target: ClassVar[bool] = False

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the loss of each row, and whether its label is a candidate: its logit is not -inf."""
        label_N1 = rows.tokens_N.clamp_min(0)[:, None]
        found_N = (rows.tokens_N >= 0) & (rows.drafter_logits_NV.gather(1, label_N1)[:, 0] > -torch.inf)
        kept = replace(rows, tokens_N=rows.tokens_N.where(found_N, -1))
        return {"loss": kept.cross_entropy_N, RECALL: found_N.float()}

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the loss of all rows, and note how many labels are candidates."""
        self._found_N = values[RECALL].detach()
        return values["loss"]

    def figures(self) -> Mapping[str, tuple[Tensor, int]]:
        """Return the labels that are candidates; nothing where there was no row."""
        found_N: Tensor | None = getattr(self, "_found_N", None)
        return {} if found_N is None else {RECALL: (found_N.sum(), len(found_N))}
