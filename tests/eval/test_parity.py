"""Greedy parity: a difference at a near tie is explained by rounding, a wrongly accepted token is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.generations import Generation
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, decode

TWIN = 200
"""A token whose row of the head is nearly that of another one."""


class AcceptsTheFirst(Lossless):
    """A planted fault: the first draft token of every round is accepted, right or wrong."""

    def __call__(self, proposal: Any, target_probs_NV: Any, node_hidden_ND: Any, generator: Any) -> Any:
        path, token = super().__call__(proposal, target_probs_NV, node_hidden_ND, generator)
        if len(path) == 1 and proposal.num_draft_tokens:
            return [0, 1], int(target_probs_NV.row(1).argmax())
        return path, token


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def target(request: pytest.FixtureRequest) -> Target:
    return Target(random_llama().to(request.param), byte_tokenizer(), name="T", fingerprint="")


def swapped(one: Generation, position: int, token: int) -> Generation:
    """Return an output with another token at one position."""
    tokens = list(one.tokens)
    tokens[position] = token
    return replace(one, tokens=tokens)


def with_a_twin(target: Target, token: int, *, shift: float) -> None:
    """Give the token's row of the head, moved a little, to TWIN."""
    rows = target.model.get_output_embeddings().weight
    with torch.no_grad():
        rows[TWIN] = rows[token] * (1 - shift)


def test_equal_outputs_are_exact(target: Target) -> None:
    plain = decode(target, NoDraft(), new=12)
    found = parity(plain, plain, target)
    assert (found.exact, found.lossless, found.num_near_ties, found.num_unexplained) == (True, True, 0, 0)
    assert found.short() == "exact 3/3"


@pytest.mark.parametrize("plain_has_the_twin", [False, True])
def test_a_choice_between_twins_is_a_near_tie_and_its_gap_is_not_negative(
    target: Target, plain_has_the_twin: bool
) -> None:
    (plain,) = decode(target, NoDraft(), prompts=PROMPTS[:1], new=12)
    with_a_twin(target, plain.tokens[5], shift=1e-10)
    pair = [plain, swapped(plain, 5, TWIN)]
    found = parity(*([one] for one in (reversed(pair) if plain_has_the_twin else pair)), target)
    (divergence,) = found.divergences
    assert (found.exact, found.lossless, divergence.position) == (False, True, 5)
    assert 0 <= divergence.logit_gap <= divergence.rounding
    assert found.short() == "identical 0/1, near ties 1/1, unexplained 0"
    assert "0 of 1 outputs equal; 1 differ first at a near tie" in found.text
    assert "NOT LOSSLESS" not in found.text


def test_twins_that_differ_by_more_than_rounding_are_unexplained() -> None:
    target = Target(random_llama().double(), byte_tokenizer(), name="T", fingerprint="")
    (plain,) = decode(target, NoDraft(), prompts=PROMPTS[:1], new=12)
    with_a_twin(target, plain.tokens[5], shift=1e-3)
    found = parity([plain], [swapped(plain, 5, TWIN)], target)
    assert not found.lossless
    assert found.divergences[0].rounding < found.divergences[0].logit_gap < 0.01


def test_a_wrongly_accepted_token_is_unexplained(target: Target) -> None:
    plain, honest = (decode(target, proposer, new=40) for proposer in (NoDraft(), Ngram()))
    assert parity(plain, honest, target).lossless
    found = parity(plain, decode(target, Ngram(), new=40, rule=AcceptsTheFirst()), target)
    assert found.num_unexplained > 0
    assert "NOT LOSSLESS" in found.text
    assert f"unexplained {found.num_unexplained}" in found.short()


def test_an_output_that_ends_early_is_unexplained(target: Target) -> None:
    plain = decode(target, NoDraft(), new=12)
    found = parity(plain, [replace(plain[0], tokens=plain[0].tokens[:7]), *plain[1:]], target)
    assert (found.num_equal, found.num_unexplained) == (2, 1)
