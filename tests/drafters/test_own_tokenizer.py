"""A drafter with its own tokenizer: what it reads and caches, what it drafts, where it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm import proposer as proposers
from drafttrain.drafters.causal_lm.decoding import DecodingLM
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.causal_lm.own_text import own_text
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from tests.conftest import random_llama
from tests.eval.decoding import decode, rounds_of_replay
from tests.small_tokenizers import letters, permuted

LETTERS = ["t", "h", "e", "c", "a", "Ġ"]
TOKENIZER = letters(LETTERS)
ORDER = [3, 6, 0, 5, 2, 4, 1]
JOINING = letters([*LETTERS, "th", "he", "ca"])
PROMPTS = [Prompt(text, TOKENIZER(text).input_ids) for text in ("the cat", "a", "heat he ate")]


def letter_target() -> Target:
    return Target(random_llama(vocab_size=7, num_layers=1).double(), TOKENIZER, name="letters", fingerprint="")


def same_in_other_ids(target: Target, *, order: list[int] = ORDER) -> CausalLMDrafter:
    """Return the target as a drafter whose tokens have other ids."""
    other = OtherTokenizer(TOKENIZER, letters(LETTERS, order=order))
    return CausalLMDrafter(permuted(target.model, ORDER), other=other).eval()


def joining_drafter() -> CausalLMDrafter:
    """Return a drafter that joins letters to tokens, of which the target has only the letters."""
    model = random_llama(vocab_size=10, num_layers=2, seed=5).double()
    return CausalLMDrafter(model, other=OtherTokenizer(TOKENIZER, JOINING)).eval()


def accepted(target: Target, drafter: CausalLMDrafter, **options: Any) -> tuple[int, int]:
    found = decode(target, drafter.proposer(target), prompts=PROMPTS, new=24, stop_tokens=(), **options)
    rounds = [one for generation in found for one in generation.rounds]
    return sum(one.num_accepted for one in rounds), sum(one.num_draft_tokens for one in rounds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_the_target_in_other_ids_is_always_accepted(temperature):
    target = letter_target()
    kept, drafted = accepted(target, same_in_other_ids(target), temperature=temperature)
    # The last round of a text may be cut.
    assert drafted - 3 * 5 < kept <= drafted
    wrong = same_in_other_ids(target, order=[*ORDER[1:], ORDER[0]])
    kept, drafted = accepted(target, wrong, temperature=temperature)
    assert kept < drafted / 2


def test_its_trees_are_those_of_the_same_drafter_in_the_targets_ids():
    target, policy = letter_target(), TreeLength(TreeSettings(num_draft_tokens=8, depth=3, width=2))

    def rounds(drafter: CausalLMDrafter) -> Any:
        found = decode(target, drafter.proposer(target), prompts=PROMPTS, new=25, policy=policy, stop_tokens=())
        return [one.rounds for one in found]

    wanted = rounds(CausalLMDrafter(target.model))
    assert any(one.num_accepted == 3 for of_text in wanted for one in of_text)
    assert rounds(same_in_other_ids(target)) == wanted
    assert rounds(same_in_other_ids(target, order=[*ORDER[1:], ORDER[0]])) != wanted


@pytest.mark.parametrize("kind", [DecodingLM, CachedLM])
def test_the_cache_is_cut_where_the_tokens_of_the_text_change(monkeypatch, kind):
    """What is drafted from the cache is what a drafter drafts that reads the whole text again in every round."""
    target, agreement = letter_target(), proposers.agreement

    def drafts(agreeing: Callable[[Any, Any], int]) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr(proposers, "agreement", agreeing)
            patch.setattr(
                proposers,
                "drafting_lm",
                lambda model, listener, layer_parallel_size: kind(model, name="drafter", listener=listener),
            )
            proposer, found = joining_drafter().proposer(target), []
            propose = proposer.propose

            def recorded(*given: Any) -> Any:
                proposals = propose(*given)
                found.extend(one.tokens_N.tolist() for one in proposals)
                return proposals

            patch.setattr(proposer, "propose", recorded)
            decode(target, proposer, prompts=PROMPTS, temperature=1.0, new=24, stop_tokens=())
        return found

    wanted = drafts(lambda held, text: 0)
    assert drafts(agreement) == wanted
    # The control: every cached token stays, whatever the text is now.
    assert drafts(lambda held, text: len(held)) != wanted


def batch_of(target: Target) -> DraftBatch:
    texts = [TOKENIZER(text).input_ids for text in ("the cat ate", "heat", "each tea at the ache")]
    records = [Record(str(i), ids, [False, *[True] * (len(ids) - 1)]) for i, ids in enumerate(texts)]
    batch, _ = pack(records, width=24, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
    return replace(batch, target_rows=target.rows_of(seen))


def gradient(drafter: CausalLMDrafter, batch: DraftBatch, kind: str) -> tuple[Any, torch.Tensor]:
    loss = losses.entry(kind).component(losses.entry(kind).settings())
    made = batch_loss(drafter, loss, with_plan(drafter, loss, batch), vocab_size=7, measured=True)
    made.total.backward()
    return made, drafter.model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("kind", ["forward_kl", "ce", "tvd"])
def test_training_is_that_of_the_same_model_in_the_targets_ids(kind):
    target = letter_target()
    model = random_llama(vocab_size=7, num_layers=2, seed=3).double()
    # Else the gradient of one token's embedding would be 0: in other ids, of another token.
    model.get_input_embeddings().padding_idx = None
    plain, plain_grad = gradient(CausalLMDrafter(model), batch_of(target), kind)
    other = OtherTokenizer(TOKENIZER, letters(LETTERS, order=ORDER))
    own, own_grad = gradient(CausalLMDrafter(permuted(model, ORDER), other=other), batch_of(target), kind)
    torch.testing.assert_close(own.loss_N, plain.loss_N)
    torch.testing.assert_close(own_grad[torch.tensor(ORDER)], plain_grad)
    # The control: a map that is off by one.
    shifted = OtherTokenizer(TOKENIZER, letters(LETTERS, order=[*ORDER[1:], ORDER[0]]))
    wrong, _ = gradient(CausalLMDrafter(permuted(model, ORDER), other=shifted), batch_of(target), kind)
    assert (wrong.loss_N - plain.loss_N).abs().max() > 0.1


def test_a_position_has_the_state_after_the_same_text():
    other = OtherTokenizer(TOKENIZER, JOINING)
    tokens = TOKENIZER("the").input_ids
    records = [Record("0", tokens, [True] * 3), Record("1", TOKENIZER("ca t").input_ids, [True] * 4)]
    batch, _ = pack(records, width=7, weight_of_step=1.0)
    own = own_text(batch, other)
    assert JOINING.convert_ids_to_tokens(own.tokens_BS[0].tolist()) == ["ca", "Ġ", "t", "th", "e"]
    assert own.positions_BS[0].tolist() == [0, 1, 2, 0, 1]
    # "c" and the first letter of "th" end inside a token of the drafter.
    assert own.readable_BT[0].tolist() == [False, True, True, True, False, True, True]
    assert own.slot_BT[0].tolist() == [0, 0, 1, 2, 0, 3, 4]


def test_rows_inside_a_token_of_the_drafter_are_not_trained_and_accept_nothing():
    target, drafter = letter_target(), joining_drafter()
    batch = drafter.with_own_text(batch_of(target))
    made, _ = gradient(drafter, batch, "forward_kl")
    assert batch.own is not None
    # Row n predicts the token after its position: the first token of a document is no label.
    read_N = batch.own.readable_BT.flatten()[rows_of(batch)]
    assert 0 < int(read_N.sum()) < len(read_N)
    assert (made.loss_N[~read_N] == 0).all()
    assert (made.loss_N[read_N] != 0).all()
    assert (made.acceptance_N[~read_N] == 0).all()
    assert (made.acceptance_N[read_N] > 0).all()


def rows_of(batch: DraftBatch) -> torch.Tensor:
    same_BT = batch.documents_BT[:, 1:] == batch.documents_BT[:, :-1]
    return (torch.nn.functional.pad(same_BT & (batch.documents_BT[:, 1:] >= 0), (0, 1))).flatten().nonzero()[:, 0]


def test_replay_counts_the_rounds_of_decoding_where_both_read_alike():
    target = letter_target()
    drafter = same_in_other_ids(target)
    torch.nn.init.normal_(drafter.model.model.norm.weight, 1.0, 0.5)
    right, wrong = rounds_of_replay(target, drafter, PROMPTS, temperature=0.0, num_draft_tokens=[5, 1])
    assert right.abs().max() < 1e-6
    assert wrong.abs().max() > 1
