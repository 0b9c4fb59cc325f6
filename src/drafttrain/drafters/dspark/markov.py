"""The heads on top of a block: a bias by the token before, of low rank, and the predicted chance of acceptance.

A = blocks, S = sequences, K = draft tokens of a block, D = hidden, r = rank, V = the target's vocabulary, R = the drafter's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

STD = 0.02
"""Of the initial weights."""


class MarkovHead(nn.Module):
    """logits_s = U_s + W2 f_s, f_s = W1[token before the one that slot s predicts]: a bigram of rank r over the block.

    W2 is zero at first, so that training starts from the slots' own logits U_s. Tensors have the names of DeepSpec's checkpoints.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """

    recurrent: ClassVar[bool] = False
    """The factor of a slot depends on all tokens of the block before it."""

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=STD)
        nn.init.zeros_(self.markov_w2.weight)

    @property
    def added(self) -> nn.Linear:
        """W2."""
        return self.markov_w2

    def embed(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return W1 of tokens, given as the target's ids."""
        embedded: Tensor = self.markov_w1(tokens)
        return embedded.to(dtype)

    def start(self, hidden_AD: Tensor) -> Tensor:
        """Return state_Ar before the first token of a block."""
        return hidden_AD.new_zeros(len(hidden_AD), self.rank)

    def step(self, place: int, hidden_AD: Tensor, embedded_Ar: Tensor, state_Ar: Tensor) -> tuple[Tensor, Tensor]:
        """Return (factor_Ar, state_Ar) of a slot: what W2 multiplies, and the state after it.

        Args:
            place: The slot's number, which has no effect.
            hidden_AD: The slot's state, after the final norm.
            embedded_Ar: W1 of the token before the one that the slot predicts.
        """
        return embedded_Ar, state_Ar

    def factors(self, hidden_AKD: Tensor, embedded_AKr: Tensor) -> Tensor:
        """Return factor_AKr of all slots, whose tokens before are known: the same numbers as from slot to slot."""
        if not self.recurrent:
            return self.step(0, hidden_AKD, embedded_AKr, embedded_AKr)[0]
        state_Ar, found = self.start(hidden_AKD[:, 0]), []
        for place, (hidden_AD, embedded_Ar) in enumerate(
            zip(hidden_AKD.unbind(1), embedded_AKr.unbind(1), strict=True)
        ):
            factor_Ar, state_Ar = self.step(place, hidden_AD, embedded_Ar, state_Ar)
            found.append(factor_Ar)
        return torch.stack(found, dim=1)


class GatedMarkovHead(MarkovHead):
    """f_s = sigmoid(G [h_s ; e] + b) * e, e = W1[token before]: the slot decides how much of the bigram counts."""

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size, rank=rank)
        self.gate_proj = _projection(hidden_size + rank, rank)

    def step(self, place: int, hidden_AD: Tensor, embedded_Ar: Tensor, state_Ar: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gated embedding."""
        gate_Ar: Tensor = self.gate_proj(torch.cat([hidden_AD, embedded_Ar], dim=-1))
        return gate_Ar.sigmoid() * embedded_Ar, state_Ar


class RecurrentMarkovHead(MarkovHead):
    """[g, c, o] = J [state ; e ; h_s] + b; state' = sigmoid(g) state + (1 - sigmoid(g)) tanh(c); f_s = tanh(o); state 0 at first."""

    recurrent = True

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size, rank=rank)
        self.joint_proj = _projection(2 * rank + hidden_size, 3 * rank)

    def step(self, place: int, hidden_AD: Tensor, embedded_Ar: Tensor, state_Ar: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the new state."""
        joint_Aj: Tensor = self.joint_proj(torch.cat([state_Ar, embedded_Ar, hidden_AD], dim=-1))
        gate_Ar, candidate_Ar, output_Ar = joint_Aj.chunk(3, dim=-1)
        keep_Ar = gate_Ar.sigmoid()
        return output_Ar.tanh(), keep_Ar * state_Ar + (1 - keep_Ar) * candidate_Ar.tanh()


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}


class ConfidenceHead(nn.Module):
    """The logit of the chance that the token of a slot is accepted, before it is drawn: w [h_s ; W1[token before]] + b."""

    def __init__(self, *, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        """0: the head reads the slot's state alone."""
        self.proj = _projection(hidden_size + rank, 1)

    def forward(self, hidden_AKD: Tensor, embedded_AKr: Tensor) -> Tensor:
        """Return score_AK. Gradients reach the block and W1, as published."""
        seen = torch.cat([hidden_AKD, embedded_AKr], dim=-1) if self.rank else hidden_AKD
        scores: Tensor = self.proj(seen)
        return scores[..., 0]


def head_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the heads' tensors, by name, for the fields of config.json."""
    vocab, width, rank = config["vocab_size"], config["hidden_size"], config["markov_rank"]
    with torch.device("meta"):
        heads = nn.ModuleDict(
            {
                "markov_head": MARKOV_HEADS[config["markov_head_type"]](
                    vocab_size=vocab,
                    draft_vocab_size=config.get("draft_vocab_size") or vocab,
                    hidden_size=width,
                    rank=rank,
                )
            }
        )
        if config["enable_confidence_head"]:
            with_markov = config["confidence_head_with_markov"]
            heads["confidence_head"] = ConfidenceHead(hidden_size=width, rank=rank if with_markov else 0)
    return {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}


def _projection(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer
