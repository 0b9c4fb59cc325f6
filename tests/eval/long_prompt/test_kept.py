"""Reduced prompts: the whole is plain decoding bit for bit, a part is the whole with the rest masked, positions included.

H = heads, G = key-value heads, P = tokens before the prompt's last one, C = columns, N = new tokens
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.long_prompt.kept import Amount, KeptPrompts, KeyOrder, Order, TokenOrder
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import decode, noisy

TOKENS = [7, 3, 3, 9, 11, 2, 5, 8, 7, 3, 12, 4, 9, 9, 1]
PROMPT, NEW = Prompt("a", TOKENS), [TOKENS[-1], 5, 6, 7]
CACHED = len(TOKENS) - 1
LAYERS, GROUPS, HEADS = 2, 1, 2


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=LAYERS).double(), byte_tokenizer(), name="tiny", fingerprint="")


def key_order(seed: int = 0, *, same_in_layers: bool = False) -> KeyOrder:
    torch.manual_seed(seed)
    drawn = [torch.stack([torch.randperm(CACHED) for _ in range(GROUPS)]) for _ in range(LAYERS)]
    return KeyOrder([drawn[0]] * LAYERS if same_in_layers else drawn)


ORDERS: dict[str, Order] = {
    "keys": key_order(),
    "tokens": TokenOrder(torch.randperm(CACHED, generator=torch.Generator().manual_seed(1)).tolist()),
    "renumbered": TokenOrder(list(reversed(range(CACHED))), "renumbered"),
}


def rows(target: Target, order: Order, count: int) -> Tensor:
    """Return the logits at the new tokens."""
    lm = CachedLM(target.model, name="target")
    order.prefill(lm, PROMPT, count, TargetNeeds())
    (seen,) = lm.forward([NEW])
    return seen.logits_BTV[0]


def masked_rows(target: Target, allowed_HNC: Tensor, tokens: list[int], positions: list[int]) -> Tensor:
    """Return the logits of one call without a cache, in which tokens attend only where it is allowed."""
    mask = torch.zeros(allowed_HNC.shape, dtype=torch.float64).masked_fill(~allowed_HNC, torch.finfo(torch.float64).min)
    with torch.no_grad():
        out = target.model(
            torch.tensor([tokens]),
            attention_mask=mask.expand(1, HEADS, *mask.shape[-2:]),
            position_ids=torch.tensor([positions]),
        )
    return out.logits[0, -len(NEW) :]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_prompt_is_plain_decoding_bit_for_bit(target, name, temperature):
    own = decode(target, NoDraft(), prompts=[PROMPT], temperature=temperature, new=12)
    kept = [
        decode(target, NoDraft(), prompts=[PROMPT], temperature=temperature, new=12, prefill=prefill)
        for prefill in (
            KeptPrompts({"a": ORDERS[name]}, Amount(tokens=len(TOKENS))),
            KeptPrompts({"a": ORDERS[name]}, Amount(share=1.0)),
            KeptPrompts({"a": ORDERS[name]}, Amount(tokens=2)),
        )
    ]
    assert [one[0].tokens for one in kept[:2]] == [own[0].tokens] * 2
    assert kept[2][0].tokens != own[0].tokens, "control: a part of it is not"
    whole = rows(target, ORDERS[name], len(TOKENS))
    lm = CachedLM(target.model, name="target")
    lm.begin([TOKENS[:-1]])
    assert torch.equal(whole, lm.forward([NEW])[0].logits_BTV[0])
    assert not torch.equal(whole, rows(target, ORDERS[name], len(TOKENS) - 1)), "control: one key or token less"


@pytest.mark.parametrize("count", [1, 2, 6, 14])
def test_a_reduced_cache_is_the_whole_one_with_the_other_columns_masked(target, count):
    order = key_order(same_in_layers=True)
    read = [*TOKENS[:-1], *NEW]
    allowed = torch.ones(len(read), len(read), dtype=torch.bool).tril()
    left_out = sorted(set(range(CACHED)) - set(order.kept(count)[0][0].tolist()))
    allowed[CACHED:, left_out] = False
    found = rows(target, order, count)
    whole = masked_rows(target, allowed, read, list(range(len(read))))
    torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)
    near = [*range(CACHED), *range(count - 1, count - 1 + len(NEW))]
    renumbered = masked_rows(target, allowed, read, near)
    # Without any key of the prompt, only distances between the new tokens are left.
    assert (count == 1) == torch.allclose(found, renumbered, atol=1e-3), (
        "control: positions that begin after the kept keys"
    )


def test_every_head_keeps_its_own_keys():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=1, initializer_range=0.2, **sizes)
    target = Target(LlamaForCausalLM(config).double().eval(), byte_tokenizer(), name="two heads", fingerprint="")
    order = KeyOrder([torch.stack([torch.arange(CACHED), torch.arange(CACHED).flip(0)])])
    read = [*TOKENS[:-1], *NEW]
    allowed_HNC = torch.ones(2, len(read), len(read), dtype=torch.bool).tril()
    for head, kept in enumerate(order.kept(5)[0].tolist()):
        allowed_HNC[head, CACHED:, [place for place in range(CACHED) if place not in kept]] = False
    found = rows(target, order, 5)
    torch.testing.assert_close(found, masked_rows(target, allowed_HNC, read, list(range(len(read)))), atol=1e-9, rtol=0)
    swapped = masked_rows(target, allowed_HNC.flip(0), read, list(range(len(read))))
    assert not torch.allclose(found, swapped, atol=1e-3), "control: the other head's keys"


@pytest.mark.parametrize("count", [2, 6, 14])
def test_a_shorter_text_keeps_its_positions_or_is_a_text_of_its_own(target, count):
    order = ORDERS["tokens"]
    kept = order.kept(count)
    tokens, places = [TOKENS[place] for place in kept], [*kept, *range(CACHED, CACHED + len(NEW))]
    causal = torch.ones(len(places), len(places), dtype=torch.bool).tril()
    own = masked_rows(target, causal, [*tokens, *NEW], list(range(len(places))))
    whole = masked_rows(target, causal, [*tokens, *NEW], places)
    torch.testing.assert_close(rows(target, order, count), whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(rows(target, TokenOrder(order.order_P, "renumbered"), count), own, atol=1e-9, rtol=0)
    assert not torch.allclose(whole, own, atol=1e-3), "control: positions matter"


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("policy", [None, TreeLength(TreeSettings(num_draft_tokens=6, depth=3, width=2))])
def test_drafting_after_a_reduced_prompt_gives_the_text_of_plain_decoding_after_it(target, name, policy):
    prefill = KeptPrompts({"a": ORDERS[name]}, Amount(tokens=6))
    proposer = CausalLMDrafter(noisy(target.model, 0.05)).proposer(target)
    plain: Any = decode(target, NoDraft(), prompts=[PROMPT], new=20, prefill=prefill)
    drafted = decode(target, proposer, prompts=[PROMPT], new=20, prefill=prefill, policy=policy)
    assert drafted[0].tokens == plain[0].tokens
    assert sum(one.num_accepted for one in drafted[0].rounds) > 0


def test_sequences_of_a_batch_are_reduced_each_by_itself(target):
    orders, texts, counts = [key_order(0), key_order(1)], [TOKENS[:-1], TOKENS[:-1][::-1]], [4, 9]
    lm = CachedLM(target.model, name="target")

    def read(chosen: list[int]) -> list[Tensor]:
        lm.begin([texts[i] for i in chosen])
        lm.reduce([[orders[i].kept(counts[i])[layer] for i in chosen] for layer in range(LAYERS)])
        assert lm.lengths == [counts[i] - 1 for i in chosen]
        first = lm.forward([NEW[:2]] * len(chosen))
        lm.keep([[0, 1]] * len(chosen))
        second = lm.forward([NEW[2:]] * len(chosen))
        return [torch.cat([a.logits_BTV[0], b.logits_BTV[0]]) for a, b in zip(first, second, strict=True)]

    together = read([0, 1])
    for number, alone in enumerate([read([0]), read([1])]):
        torch.testing.assert_close(together[number], alone[0], atol=1e-9, rtol=0)


def test_kept_mass_counts_what_is_kept():
    mass = [torch.rand(GROUPS, CACHED) for _ in range(LAYERS)]
    for order in ORDERS.values():
        shares = [order.kept_mass(mass, count) for count in range(1, len(TOKENS) + 1)]
        assert shares[0] == 0
        assert shares == sorted(shares), "orders are nested: more is kept of what was kept"
        assert shares[-1] == pytest.approx(sum(float(one.sum()) for one in mass))
    one = [torch.zeros(GROUPS, CACHED) for _ in range(LAYERS)]
    one[1][0, 3] = 1.0
    order = ORDERS["keys"]
    for count in range(1, len(TOKENS) + 1):
        assert order.kept_mass(one, count) == float(3 in order.kept(count)[1][0].tolist())


def test_amounts_are_tokens_or_shares_and_at_least_the_last_token():
    assert [Amount(tokens=5).of(n) for n in (3, 5, 9)] == [3, 5, 5]
    assert [Amount(share=0.25).of(n) for n in (1, 8, 100)] == [1, 2, 25]
    assert [str(Amount(tokens=5)), str(Amount(share=0.25))] == ["5", "25%"]


def test_several_prompts_are_refused_with_what_to_do(target):
    prefill = KeptPrompts({"a": ORDERS["tokens"]}, Amount(tokens=2))
    with pytest.raises(CheckpointError, match="give generate one prompt, got 2"):
        prefill(CachedLM(target.model, name="target"), [PROMPT, PROMPT], TargetNeeds())


def test_states_of_tokens_that_were_left_out_are_refused(target):
    prefill, lm = KeptPrompts({PROMPT.id: ORDERS["tokens"]}, Amount(tokens=2)), CachedLM(target.model, name="target")
    with pytest.raises(CheckpointError, match="no states at the tokens left out"):
        prefill(lm, [PROMPT], TargetNeeds(final=True))
    prefill(lm, [PROMPT], TargetNeeds())
