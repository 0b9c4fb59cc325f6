"""Final states in eight bits, rounded so that the target's distribution moves least.

Rounding every feature to the nearest integer moves the logits of the likely tokens by random amounts. Here some features are rounded
the other way, so that these amounts cancel: of a block of features, one after another, the one that lowers sum_k p_k (z_k - z)^2 most,
where z_k is the error of logit k and z its mean under p: twice the second-order term of KL(p || p').

N = rows, V = vocabulary, D = features, K = likely tokens, F = features of a block, S = stored bytes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.eight_bit import LARGEST, codes_and_steps, in_eight_bits
from drafttrain.target_model.logits import head_logits

TOKENS = 128
"""Likely tokens whose logits are compared."""
BLOCK = 128
CHANGES = 32
"""Features of a block that are rounded the other way, at most."""
NUMBERS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}


@torch.no_grad()
def rounded_for_head(final_ND: Tensor, model: Any, *, num_tokens: int) -> Tensor:
    """Return final states as int8 rows_NS; of a head that is no plain matrix, rounded to the nearest."""
    stored_NS = in_eight_bits(final_ND)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
        return stored_NS
    tokens = min(TOKENS, num_tokens)
    at_once = max(1, NUMBERS_AT_ONCE.get(final_ND.device.type, 1 << 22) // (tokens * final_ND.shape[1]))
    for final_nD, stored_nS in zip(final_ND.split(at_once), stored_NS.split(at_once), strict=True):
        probs_nV = head_logits(model, final_nD.to(model.dtype))[:, :num_tokens].float().softmax(dim=-1)
        probs_nK, ids_nK = probs_nV.topk(tokens, dim=-1)
        weight_nKD = head.weight[ids_nK.to(head.weight.device)].to(final_nD.device).float()
        stored_nS[:, : final_nD.shape[1]] = _rounded(final_nD.float(), stored_nS, probs_nK, weight_nKD).to(torch.int8)
    return stored_NS


def _rounded(final_ND: Tensor, stored_NS: Tensor, probs_NK: Tensor, weight_NKD: Tensor) -> Tensor:
    """Return the integers codes_ND."""
    codes_ND, steps_ND = codes_and_steps(stored_NS)
    probs_NK = probs_NK / probs_NK.sum(dim=-1, keepdim=True)
    centred_NKD = weight_NKD - (probs_NK[:, None] @ weight_NKD)
    # What one step of a feature adds to the weighted error of a logit.
    adds_NKD = centred_NKD * probs_NK.sqrt()[..., None] * steps_ND[:, None]
    off_ND = codes_ND - final_ND / steps_ND.clamp_min(torch.finfo(torch.float32).tiny)
    error_NK1 = adds_NKD @ off_ND[..., None]
    for begin in range(0, codes_ND.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        adds_NKF = adds_NKD[..., block]
        change_NF = _changes(codes_ND[:, block], off_ND[:, block], adds_NKF, error_NK1)
        codes_ND[:, block] += change_NF
        error_NK1 = error_NK1 + adds_NKF @ change_NF[..., None]
    return codes_ND


def _changes(codes_NF: Tensor, off_NF: Tensor, adds_NKF: Tensor, error_NK1: Tensor) -> Tensor:
    """Return by how many steps, -1, 0 or 1, each feature is changed."""
    square_NFF = adds_NKF.mT @ adds_NKF
    own_NF = square_NFF.diagonal(dim1=1, dim2=2)
    slope_NF = (adds_NKF.mT @ error_NK1)[..., 0]
    change_NF, row_N = torch.zeros_like(codes_NF), torch.arange(len(codes_NF), device=codes_NF.device)
    for _ in range(CHANGES):
        step_NF = -slope_NF.sign()
        after_NF = change_NF + step_NF
        allowed_NF = ((off_NF + after_NF).abs() <= 1) & ((codes_NF + after_NF).abs() <= LARGEST)
        gain_N, best_N = (2 * slope_NF.abs() - own_NF).where(allowed_NF, 0).max(dim=-1)
        taken_N = step_NF[row_N, best_N] * (gain_N > 0)
        change_NF[row_N, best_N] += taken_N
        slope_NF = slope_NF + square_NFF[row_N, best_N] * taken_N[:, None]
    return change_NF
