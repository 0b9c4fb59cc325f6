"""XPress in the loop: greedy identity, passes against training, output distribution, trees, ledger."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.proposals import DraftStep, NodeKind, Proposal, chain
from drafttrain.core.texts import Sampling
from drafttrain.drafters.xpress.proposer import XPressProposer
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.losses.align import chosen_slots
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target
from tests.drafters.test_dspark import all_logits, batch_of
from tests.drafters.test_xpress import made
from tests.eval.decoding import chi_square
from tests.eval.test_domino_engine import NEW, PROMPTS, Watching, decoded, drafted, fitted, written
from tests.eval.test_eagle_engine import Tree

XPRESS: dict[str, Any] = {"rank": 6, "mlp_hidden": 8, "block_size": 5}
CHAIN, TREE = FixedLength(FixedLengthSettings(4)), Tree(12, 3, 3)


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


@functools.cache
def trained_briefly(target: Target) -> Any:
    """Return a drafter that is often right: trained briefly on the target's text after the prompts."""
    return fitted(target, block_drafter(target, "xpress", **XPRESS, anchors=64), num_steps=25)


def restless(target: Target, *, num_passes: int, num_candidates: int = 0) -> Any:
    """Return a drafter of four tokens whose passes change them."""
    return made(target, block_size=5, anchors=64, num_passes=num_passes, num_candidates=num_candidates)


@pytest.mark.parametrize(("num_passes", "policy"), [(1, CHAIN), (6, CHAIN), (6, TREE)])
def test_greedy_output_is_the_targets_own_together_and_alone(target, num_passes, policy):
    drafter = trained_briefly(target)
    drafter.config["xpress_num_passes"] = num_passes
    together = decoded(target, drafter, policy)
    assert [g.tokens for g in together] == [list(text) for text in written(target)]
    alone = [decoded(target, drafter, policy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert [g.rounds for g in together] == [g.rounds for g in alone]
    assert sum(one.num_accepted for g in together for one in g.rounds) >= NEW // 2


def steps_of(target: Target, drafter: Any, *, depth: int = 4, temperature: float = 0.0) -> tuple[Tensor, Proposal]:
    """Return (logits_KV, the proposal) after the tokens 3, 4, 5, 6."""
    policy = Watching()
    proposed = drafted(
        target, drafter, Sampling(temperature=temperature), FixedLength(FixedLengthSettings(depth)), policy.more
    )
    return torch.stack([step.logits_V for step in policy.steps]), proposed


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_trained_pass_has_the_logits_of_decoding_with_as_many_passes(target, number):
    """Training's pass on its own tokens, at a root in a packed batch: that of decoding, whose text ends at the root."""
    drafter = restless(target, num_passes=number + 1)
    found_KV, proposed = steps_of(target, drafter)
    assert proposed.tokens_N.tolist()[1:] == found_KV.argmax(-1).tolist()
    # What the text goes on with has no effect on a pass on the drafter's own tokens.
    batch = batch_of(target, drafter, [90, 80, 70, 60, 50], [3, 4, 5, 6, 100, 101, 102, 103, 104])
    trained = drafter.train()(batch)
    roots = chosen_slots(batch, drafter.rows_asked()[0]).tolist()
    drafter.eval()
    place = roots.index(batch.tokens_BT.flatten().tolist().index(6))
    rows = [
        torch.stack([one.logits_BTV(depth)[0, place] for depth in (1, 2, 3, 4)])
        for one in (trained, *(beside.drafted for beside in trained.beside))
    ]
    text_KV, *passes = rows
    torch.testing.assert_close(passes[number], found_KV, rtol=0, atol=1e-10)
    # The controls: the pass on the text's tokens, and the pass after this one.
    assert (text_KV - found_KV)[1:].abs().max() > 1e-2
    assert (passes[number + 1] - found_KV).abs().max() > 1e-2


def test_settled_passes_have_the_logits_of_the_text_they_draft(target):
    """With as many passes as tokens, a draft's rows are those of validation, where the text is the draft."""
    drafter = restless(target, num_passes=4)
    found_KV, proposed = steps_of(target, drafter)
    tokens = [3, 4, 5, *proposed.tokens_N.tolist()]
    torch.testing.assert_close(found_KV, all_logits(target, drafter, tokens)[3], rtol=0, atol=1e-10)
    # More passes change nothing; a shorter draft is its beginning. The control: fewer passes have not settled.
    more = restless(target, num_passes=9)
    assert torch.equal(steps_of(target, more)[1].tokens_N, proposed.tokens_N)
    assert torch.equal(steps_of(target, more, depth=2)[1].tokens_N, proposed.tokens_N[:3])
    early = restless(target, num_passes=1)
    assert not torch.equal(steps_of(target, early)[1].tokens_N, proposed.tokens_N)


def test_a_chain_is_the_argmax_and_fixed_at_every_temperature(target):
    drafter = restless(target, num_passes=3)
    cold, warm = (steps_of(target, drafter, temperature=temperature)[1] for temperature in (0.0, 1.5))
    assert torch.equal(cold.tokens_N, warm.tokens_N)
    assert set(warm.kinds_N[1:].tolist()) == {NodeKind.FIXED.value}
    assert warm.q_rows_RV is None


def test_candidates_leave_other_tokens_out(target):
    all_KV, exact = steps_of(target, restless(target, num_passes=4, num_candidates=257))
    wanted_KV, wanted = steps_of(target, restless(target, num_passes=4))
    assert torch.equal(exact.tokens_N, wanted.tokens_N)
    torch.testing.assert_close(all_KV, wanted_KV)
    few_KV, few = steps_of(target, restless(target, num_passes=4, num_candidates=2))
    assert few_KV.isfinite().sum(-1).tolist() == [2] * 4
    assert not torch.equal(few.tokens_N, wanted.tokens_N)


def test_the_children_of_a_node_depend_on_all_its_tokens(target):
    """In a tree, the second level has the rows of chains with their tokens."""
    drafter, steps = restless(target, num_passes=6), list[DraftStep]()
    drafted(target, drafter, Sampling(), TREE, lambda step: steps.append(step) or True)
    second = [step for step in steps if step.depth == 2]
    assert len({step.token for step in second}) == 3
    for step in second:
        wanted_V = all_logits(target, drafter, [3, 4, 5, 6, step.token, 0, 0, 0])[3, 1]
        torch.testing.assert_close(step.logits_V, wanted_V, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("num_passes", "run"), [(2, 2), (6, 4)])
def test_every_weight_that_a_round_reads_is_in_the_ledger(target, num_passes, run):
    drafter, ledger = restless(target, num_passes=num_passes), Ledger()
    decoded(target, drafter, prompts=PROMPTS[2:], listener=ledger.append)
    _, first, *_ = [event for event in ledger.events if event.model == "drafter"]
    size = lambda *parts: sum(8 * p.numel() for part in parts for p in part.parameters())  # noqa: E731
    columns, head = 2 * 2 * 2 * 6 * 8 * (len(PROMPTS[2].tokens) - 1), drafter.xpress_head
    of_passes = run * size(head.in_proj, head.mix, head.mlp, head.w2) + size(head.down_h, head.down_g)
    block = size(drafter.layers, drafter.norm) + 257 * 32 * 8 + 2 * 32 * 8
    assert first.bytes_read == block + of_passes + columns


# ---------------------------------------------------------------- the output distribution


@pytest.fixture(scope="module")
def small() -> Any:
    """A target with 8 tokens, and a drafter whose corrections matter."""
    target = block_target(vocab_size=8, num_layers=3, hidden_size=16)
    settings = XPRESS | {"taps": [1, 2], "mask_token_id": 7, "num_passes": 2}
    return target, block_drafter(target, "xpress", scale=0.6, **settings)


def distribution_of(target: Target, proposer: Any) -> float:
    return chi_square(target.model, proposer, 1.0, samples=800, target=target)


@pytest.mark.long
def test_the_output_has_the_targets_distribution(small):
    target, drafter = small
    assert distribution_of(target, drafter.proposer(target)) > 1e-3


@pytest.mark.long
def test_control_an_argmax_that_is_handed_over_as_drawn_changes_the_output(small):
    """The tokens are no draws: with rows of q, here uniform ones, another distribution comes out."""
    target, drafter = small

    class Wrong(XPressProposer):
        def propose(self, *arguments: Any) -> list[Proposal]:
            return [self.misstated(one) for one in super().propose(*arguments)]

        def misstated(self, one: Proposal) -> Proposal:
            if not one.num_draft_tokens:
                return one
            rows_RV = torch.full((one.num_draft_tokens, 8), 1 / 8, dtype=torch.float64)
            return chain(one.tokens_N.tolist(), kind=NodeKind.SAMPLED, q_rows_RV=rows_RV)

    sizes: dict[str, Any] = {"vocab_size": 8, "num_tokens": 8, "device": target.device}
    assert distribution_of(target, Wrong(drafter, **sizes)) < 1e-3
