"""Rows computed on demand give the verdicts of rows computed all at once, and only rows on the path are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core import target_probs
from drafttrain.core.probability import residual, residual_without, sampling_probs, without_padding
from drafttrain.core.proposals import DrawMode, NodeKind, Proposal
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.acceptance.typical import Typical

V, TOKENS = 12, 11
PARENTS = [-1, 0, 0, 0, 1, 1, 2, 4]
SAMPLINGS = [
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.0, top_k=4),
    Sampling(1.0, top_p=0.8),
]


def proposal(seed: int, draw: DrawMode) -> tuple[Proposal, Tensor]:
    """Return a tree with FIXED and SAMPLED siblings, and bfloat16 logits that accept some of it."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.randint(1, 3, (len(PARENTS),), generator=random)
    if seed % 3 == 0:
        kinds.fill_(NodeKind.FIXED.value)
    tokens = torch.stack([torch.randperm(TOKENS, generator=random)[0] for _ in PARENTS])
    for parent in (0, 1):  # siblings differ
        siblings = [node for node, one in enumerate(PARENTS) if one == parent]
        tokens[siblings] = torch.randperm(TOKENS, generator=random)[: len(siblings)]
    logits_NV = torch.randn(len(PARENTS), V, generator=random)
    for node, parent in enumerate(PARENTS[1:], start=1):
        logits_NV[parent, tokens[node]] += 2
    one = Proposal(
        tokens_N=tokens,
        parents_N=torch.tensor(PARENTS),
        depths_N=torch.tensor([0, 1, 1, 1, 2, 2, 2, 3]),
        kinds_N=kinds,
        q_rows_RV=torch.rand(len(PARENTS), V, generator=random).softmax(-1),
        q_row_N=torch.arange(len(PARENTS)),
        draw=draw,
    )
    return one, logits_NV.bfloat16()


def verdicts(rule: Any, sampling: Sampling, *, on_demand: bool, shift: int = 0) -> list[Any]:
    found: list[Any] = []
    for draw in DrawMode:
        for seed in range(30):
            one, logits_NV = proposal(seed, draw)
            logits_NV = logits_NV.roll(shift, 0)
            generator = torch.Generator().manual_seed(seed)
            probs = TargetProbs(logits_NV, sampling, num_tokens=TOKENS)
            if not on_demand:
                probs = TargetProbs.of(sampling_probs(without_padding(logits_NV, num_tokens=TOKENS), sampling))
            found.append(rule(one, probs, None, generator))
            if sampling.temperature > 0:
                found.append(float(torch.rand(1, generator=generator)))
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", [Lossless(), Typical()], ids=["lossless", "typical"])
def test_verdicts_and_random_numbers_are_those_of_all_rows(rule, sampling):
    found = verdicts(rule, sampling, on_demand=True)
    assert found == verdicts(rule, sampling, on_demand=False)
    assert len({len(one[0]) for one in found if isinstance(one, tuple)}) > 1
    assert found != verdicts(rule, sampling, on_demand=True, shift=1)  # the control


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_rows_on_the_path_are_computed(temperature, monkeypatch):
    rows: list[Tensor] = []

    def counted(logits_NV: Tensor, sampling: Sampling) -> Tensor:
        rows.extend(logits_NV)
        return sampling_probs(logits_NV, sampling)

    monkeypatch.setattr(target_probs, "sampling_probs", counted)
    one, logits_NV = proposal(0, DrawMode.IID)  # all FIXED
    probs = TargetProbs(logits_NV, Sampling(temperature), num_tokens=TOKENS)
    path, _ = Lossless()(one, probs, None, torch.Generator())
    assert len(rows) == (len(path) if temperature else 0)


def test_the_residual_without_a_token_is_that_of_a_one_hot_row():
    probs_NV = torch.randn(50, V, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1)
    probs_NV[0] = torch.nn.functional.one_hot(torch.tensor(3), V).float()
    for row, probs_V in enumerate(probs_NV):
        one_hot_V = torch.nn.functional.one_hot(torch.tensor(row % V), V).float()
        assert torch.equal(residual_without(probs_V, row % V), residual(probs_V, one_hot_V))
