"""A distribution of which only some tokens are known: what its losses equal, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.probability import acceptance_rate
from drafttrain.core.target_rows import NamedRows
from drafttrain.losses import losses
from drafttrain.losses.buckets import in_buckets, known_acceptance
from tests.losses.test_losses import V, index, rows

POINTWISE = ["forward_kl", "reverse_kl", "jsd", "tvd", "neg_log_acceptance"]


def top(given: LossRows, count: int, *, pad: int = 0) -> NamedRows:
    """Return the largest log-probabilities of rows, with places at the end that name nothing."""
    best = given.log_p_NV.topk(count, dim=-1)
    ids_NK, log_probs_NK = best.indices, best.values
    ids_NK = torch.nn.functional.pad(ids_NK, (0, pad), value=-1)
    return NamedRows(ids_NK, torch.nn.functional.pad(log_probs_NK, (0, pad), value=-torch.inf))


def loss_and_gradient(name: str, given: LossRows, leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses.build(losses.entry(name).settings())
    loss_N = loss.combine(loss.per_row(given), index(len(given.tokens_N)))
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf, retain_graph=True)[0]


@pytest.mark.parametrize("name", POINTWISE)
def test_with_all_tokens_known_the_loss_and_its_gradient_are_those_of_the_whole_distribution(name):
    given = rows()
    whole = loss_and_gradient(name, given, given.drafter_logits_NV)
    named = loss_and_gradient(name, in_buckets(given, top(given, V, pad=2)), given.drafter_logits_NV)
    for one, other in zip(whole, named, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", POINTWISE)
def test_the_loss_does_not_depend_on_how_the_drafter_divides_the_tail(name):
    given = rows()
    named = top(given, 3)
    swapped = given.drafter_logits_NV.detach().clone()
    for row, known in zip(swapped, named.ids_NK.tolist(), strict=True):
        rest = [token for token in range(V) if token not in known]
        row[rest] = row[rest].flip(0)
    swapped.requires_grad_()
    other = LossRows(swapped, given.target_logits_NV, given.tokens_N, given.seed_N)
    one = loss_and_gradient(name, in_buckets(given, named), given.drafter_logits_NV)[0]
    assert torch.allclose(one, loss_and_gradient(name, in_buckets(other, named), swapped)[0])
    # The control: over the whole vocabulary it does.
    assert not torch.allclose(
        loss_and_gradient(name, given, given.drafter_logits_NV)[0], loss_and_gradient(name, other, swapped)[0]
    )


def test_the_known_acceptance_and_the_tails_bound_the_whole():
    given = rows(count=200)
    buckets = in_buckets(given, top(given, 3))
    least_N = known_acceptance(buckets)
    whole_N = acceptance_rate(given.log_p_NV.exp(), given.log_q_NV.exp())
    assert (least_N <= whole_N + 1e-9).all()
    assert (whole_N <= buckets.acceptance_N + 1e-9).all()
    assert (buckets.acceptance_N - least_N).max() > 0.01


def test_a_label_is_its_bucket_or_the_tail():
    given = rows(count=V)
    named = top(given, 3, pad=1)
    labels_N = in_buckets(given, named).tokens_N.tolist()
    for token, label, known in zip(given.tokens_N.tolist(), labels_N, named.ids_NK.tolist(), strict=True):
        assert label == (known.index(token) if token in known else 4)


def test_tokens_outside_the_shared_vocabulary_belong_to_the_tail():
    given = rows()
    named = NamedRows(torch.tensor([[1, V + 3]] * 5), torch.tensor([[0.5, 0.4]] * 5).log())
    buckets = in_buckets(given, named)
    assert torch.allclose(buckets.log_p_NV[:, -1].exp(), torch.tensor(0.5))
