"""The arithmetic of speculative decoding: sampling rules, acceptance rate, residual.

N = rows, V = vocabulary, R = the drafter's vocabulary, a part of it, K = draws from one row
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.proposals import DrawMode
from drafttrain.core.texts import Sampling

ARGMAX_BLOCK = 64
"""Most vocabularies have a multiple of this many tokens."""


def sampling_probs(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution a token is drawn from: temperature, then top-k, then top-p.

    Temperature 0 gives one-hot rows (the first of equal maxima), so greedy decoding needs no code of its own.
    At least float32; float64 stays float64. `-inf` logits get no probability.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if sampling.temperature == 0:
        return torch.zeros_like(logits_NV).scatter_(-1, logits_NV.argmax(-1, keepdim=True), 1.0)
    # A division by 1 would copy the rows.
    probs_NV = torch.softmax(logits_NV if sampling.temperature == 1 else logits_NV / sampling.temperature, dim=-1)
    if sampling.top_k and sampling.top_k < probs_NV.shape[-1]:
        kept = torch.zeros_like(probs_NV, dtype=torch.bool)
        kept.scatter_(-1, probs_NV.topk(sampling.top_k, dim=-1).indices, True)
        probs_NV = normalized(probs_NV.masked_fill(~kept, 0.0))
    if sampling.top_p < 1.0:
        sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = sorted_NV.cumsum(dim=-1) - sorted_NV
        sorted_NV = sorted_NV.masked_fill(before_NV >= sampling.top_p, 0.0)
        probs_NV = normalized(torch.zeros_like(probs_NV).scatter_(-1, order_NV, sorted_NV))
    return probs_NV


def likeliest(logits_NV: Tensor) -> Tensor:
    """Return tokens_N, the likeliest token of each row, the first of equal ones.

    PyTorch's argmax over wide rows is slow on a CPU: in bfloat16 it takes as long as a large model's head. Its maximum is not, so
    the block of the maximum is found first.
    """
    if logits_NV.device.type != "cpu" or logits_NV.shape[-1] % ARGMAX_BLOCK:
        return logits_NV.argmax(dim=-1)
    blocks_NBb = logits_NV.unflatten(-1, (-1, ARGMAX_BLOCK))
    block_N = blocks_NBb.amax(dim=-1).argmax(dim=-1)
    rows_N = torch.arange(len(logits_NV))
    return block_N * ARGMAX_BLOCK + blocks_NBb[rows_N, block_N].argmax(dim=-1)


def log_total(logits_NV: Tensor) -> Tensor:
    """Return the logarithm of the sum of exp(logit) of each row, float32 or wider."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).logsumexp(dim=-1)


def without_padding(logits_NV: Tensor, *, num_tokens: int) -> Tensor:
    """Return logits with -inf at the ids that the tokenizer cannot produce, `num_tokens` and above."""
    if logits_NV.shape[-1] <= num_tokens:
        return logits_NV
    padding_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device) >= num_tokens
    return logits_NV.masked_fill(padding_V, -torch.inf)


def normalized(mass_NV: Tensor) -> Tensor:
    """Return rows divided by their sums."""
    return mass_NV / mass_NV.sum(dim=-1, keepdim=True)


def over_target_vocabulary(probs_NR: Tensor, vocabulary_R: Tensor, *, size: int) -> Tensor:
    """Return distributions over a drafter's vocabulary as distributions over the target's `size` tokens."""
    probs_NV = probs_NR.new_zeros(*probs_NR.shape[:-1], size)
    probs_NV[..., vocabulary_R] = probs_NR
    return probs_NV


def acceptance_rate(target_probs_NV: Tensor, drafter_probs_NV: Tensor) -> Tensor:
    """Return, by row, the probability that a token drawn from the drafter survives verification: 1 - TVD.

    Source: Leviathan et al. 2022, Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, 3.2.
    """
    return torch.minimum(target_probs_NV, drafter_probs_NV).sum(dim=-1)


def residual(target_probs_V: Tensor, drafter_probs_V: Tensor) -> Tensor:
    """Return the distribution of the token after a rejection: the normalized positive part of p - q.

    If p equals q a rejection has probability 0; then p is returned.
    """
    return _normalized_or((target_probs_V - drafter_probs_V).clamp_min(0.0), target_probs_V)


def residual_without(probs_V: Tensor, token: int) -> Tensor:
    """Return the residual after the rejection of a token that was certain to be drafted: the others, normalized."""
    excess_V = probs_V.clone()
    excess_V[token] = 0.0
    return _normalized_or(excess_V, probs_V)


def _normalized_or(mass_V: Tensor, otherwise_V: Tensor) -> Tensor:
    total = mass_V.sum()
    return torch.where(total <= torch.finfo(mass_V.dtype).tiny, otherwise_V, mass_V / total)


def draw(probs_V: Tensor, generator: torch.Generator | None) -> int:
    """Return one token, by inverting the cumulative distribution at one uniform number.

    A draw takes exactly one number from the stream, whatever the distribution. So two decoders with one draw per token emit
    the same text.
    """
    return draw_each(probs_V[None], [generator])[0]


def draw_each(probs_NV: Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
    """Return one token per row, as `draw` does with the row's generator. The device is read once."""
    uniforms = [float(torch.rand(1, dtype=torch.float64, generator=generator)) for generator in generators]
    below_NV = probs_NV.cumsum(dim=-1, dtype=torch.float64)
    if len(uniforms) == 1:
        wanted_N1 = below_NV[:, -1:] * uniforms[0]  # a number is an argument of the kernel, a tensor needs a copy
    else:
        wanted_N1 = below_NV[:, -1:] * torch.tensor(uniforms, dtype=torch.float64).to(probs_NV.device)[:, None]
    # `right=True`: a token of probability 0 is never the first whose cumulative sum exceeds the number.
    index_N1 = torch.searchsorted(below_NV, wanted_N1, right=True).clamp(max=probs_NV.shape[-1] - 1)
    drawn: list[int] = index_N1[:, 0].tolist()
    return drawn


def draw_in_order(
    probs_NV: Tensor, generators: Sequence[torch.Generator | None], *, count: int, mode: DrawMode
) -> tuple[Tensor, Tensor]:
    """Return (tokens_NK, probs_NK): `count` tokens of each row as they are drawn one after the other, and their probabilities.

    Without replacement this is Gumbel-top-k, with `count` random numbers for a row instead of one for each token: the k-th largest
    of log q + Gumbel noise has the distribution q without the tokens of the k - 1 larger ones. Probability 0: no token was left.

    Source: Kool et al. 2019, arXiv 1903.06059, appendix A, for the order of the perturbed log-probabilities.
    """
    uniforms_NK = torch.stack([torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators])
    return draw_at(probs_NV, uniforms_NK.to(probs_NV.device), mode=mode)


def draw_at(probs_NV: Tensor, uniforms_NK: Tensor, *, mode: DrawMode) -> tuple[Tensor, Tensor]:
    """Return (tokens_NK, probs_NK) as `draw_in_order` does, at these numbers of [0, 1)."""
    left_NV, tokens, probs = probs_NV, [], []
    for uniform_N1 in uniforms_NK.split(1, dim=-1):
        below_NV = left_NV.cumsum(dim=-1, dtype=torch.float64)
        token_N1 = torch.searchsorted(below_NV, below_NV[:, -1:] * uniform_N1, right=True)
        token_N1.clamp_(max=probs_NV.shape[-1] - 1)
        tokens.append(token_N1)
        probs.append(left_NV.gather(-1, token_N1))
        if mode is DrawMode.WITHOUT_REPLACEMENT:
            left_NV = left_NV.scatter(-1, token_N1, 0.0)
    return torch.cat(tokens, dim=-1), torch.cat(probs, dim=-1)
