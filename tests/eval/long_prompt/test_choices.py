"""What each choice keeps, against slow versions of the published rules.

H = heads, N = queries, P = tokens before the prompt's last one
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt
from drafttrain.eval.engine import whole_prompts
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.choices.at_random import AtRandomSettings
from drafttrain.eval.long_prompt.choices.last_window import LastWindowSettings
from drafttrain.eval.long_prompt.choices.speckv import SpecKVSettings
from drafttrain.eval.long_prompt.choices.specpc import SpecPCSettings
from drafttrain.eval.long_prompt.kept import KeyOrder, TokenOrder
from drafttrain.eval.long_prompt.look_ahead import Models
from drafttrain.eval.long_prompt.pooling import pooled
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import greedy

PROMPT = Prompt("a", [1 + (i * i * 7) % 250 for i in range(40)])
CACHED = len(PROMPT.tokens) - 1


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=2).double(), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture(scope="module")
def models(target: Target) -> Models:
    drafter = random_llama(num_layers=4, seed=5).double()
    return Models.of(target, drafter, seed=0, look_ahead_tokens=6)


def order(settings: Any, models: Models) -> Any:
    whole_prompts(models.target, [PROMPT], TargetNeeds())
    return prompt_choices.build(settings).order(PROMPT, models)


def attention(lm: Any, text: list[int]) -> list[Tensor]:
    """Return weights_HNC of every layer, as transformers returns them."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [weights[0] for weights in model(torch.tensor([text]), output_attentions=True).attentions]


@pytest.mark.parametrize(("look_ahead", "window", "pool"), [(None, 8, 7), (3, 1, 1), (0, 8, 4), (0, 100, 7)])
def test_speckv_keeps_the_window_and_the_keys_that_queries_after_it_attend_to_most(
    target, models, look_ahead, window, pool
):
    count = 6 if look_ahead is None else look_ahead
    drafter = Target(models.drafter.model, target.tokenizer, name="drafter", fingerprint="")
    ahead = greedy(drafter, PROMPT, count) if count else []
    found = order(SpecKVSettings(look_ahead_tokens=look_ahead, window_tokens=window, pool_tokens=pool), models)
    window = min(window, CACHED)
    differs = 0
    for layer, weights_HNC in enumerate(attention(models.target, [*PROMPT.tokens, *ahead])):
        before = CACHED - window
        # Both heads share the one key-value head.
        scores = weights_HNC[:, before:, :before].amax((0, 1)).tolist()
        around = [range(max(0, i - (pool - 1) // 2), min(before, i + pool - (pool - 1) // 2)) for i in range(before)]
        smooth = [max(scores[near] for near in places) for places in around]
        for kept in range(1, len(PROMPT.tokens)):
            best = sorted(range(before), key=lambda place: -smooth[place])[: max(0, kept - 1 - window)]
            wanted = sorted([*best, *list(range(before, CACHED))[-(kept - 1) :]]) if kept > 1 else []
            assert found.kept(kept)[layer].tolist() == [wanted]
        if kept > window + 1:
            differs += found.kept(window + 4)[layer].tolist() != [list(range(CACHED - window - 3, CACHED))]
    assert window == CACHED or differs, "control: it is not the last window"


def test_speckv_reads_what_the_drafter_writes(models):
    nothing, ahead = (order(SpecKVSettings(look_ahead_tokens=n, window_tokens=4), models) for n in (0, 6))
    assert any(not torch.equal(a, b) for a, b in zip(nothing.order_LGP, ahead.order_LGP, strict=True))


@pytest.mark.parametrize(
    ("window", "pool", "neighbours", "first", "look_ahead"),
    [(8, 5, 3, None, 0), (2, 1, 0, 0, 0), (5, 4, 4, 3, 2), (64, 64, 64, 1, 0)],
)
def test_specpc_keeps_what_the_published_steps_keep(target, models, window, pool, neighbours, first, look_ahead):
    settings = SpecPCSettings(
        look_ahead_tokens=look_ahead, window_tokens=window, pool_tokens=pool, neighbours=neighbours, first_layer=first
    )
    found = order(settings, models)
    drafter = Target(models.drafter.model, target.tokenizer, name="drafter", fingerprint="")
    ahead = greedy(drafter, PROMPT, look_ahead) if look_ahead else []
    length, window = len(PROMPT.tokens), min(window, len(PROMPT.tokens))
    weights_LHNC = torch.stack(attention(models.drafter, [*PROMPT.tokens, *ahead]))[2 if first is None else first :]
    importance = torch.cat([torch.linspace(0, 1, window), torch.ones(look_ahead)]).double()
    score_P = (weights_LHNC[:, :, length - window :, :length] * importance[:, None]).amax((0, 1, 2))
    # The prompt's last token has no score here: it is always kept, and lends none to its neighbours.
    smooth = pooled(score_P[None, :CACHED], pool)[0].tolist()
    for kept in range(1, length):
        steps = list(reversed(range(length - window, CACHED)))
        for best in sorted(range(CACHED), key=lambda place: -smooth[place])[:kept]:
            offsets = range(-((max(neighbours, 1) - 1) // 2), max(neighbours, 1) - (max(neighbours, 1) - 1) // 2)
            near = sorted(offsets, key=lambda offset: (abs(offset), offset)) if neighbours else [0]
            steps += [best + offset for offset in near if 0 <= best + offset < CACHED]
        assert found.kept(kept) == sorted(list(dict.fromkeys(steps))[: kept - 1])
    assert sorted(found.order_P) == list(range(CACHED))


def test_a_drafter_of_other_layers_is_named(models):
    with pytest.raises(CheckpointError, match=r"specpc: first_layer must be 0\.\.3 for this drafter, got 4"):
        order(SpecPCSettings(first_layer=4), models)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_pooling_takes_the_best_of_the_neighbours(size):
    score_GP = torch.rand(2, 9)
    before = (size - 1) // 2
    wanted = [[max(row[max(0, i - before) : i - before + size]) for i in range(9)] for row in score_GP.tolist()]
    torch.testing.assert_close(pooled(score_GP, size), torch.tensor(wanted))


def test_the_last_window_has_the_first_tokens_too(models):
    keys, tokens = (order(LastWindowSettings(of=of, first_tokens=2), models) for of in ("keys", "tokens"))
    assert isinstance(keys, KeyOrder)
    assert isinstance(tokens, TokenOrder)
    assert tokens.kept(6) == [0, 1, CACHED - 3, CACHED - 2, CACHED - 1]
    assert all(columns_GW.tolist() == [tokens.kept(6)] for columns_GW in keys.kept(6))


def test_random_keys_are_of_each_head_and_random_tokens_of_none(models):
    first, again = (order(AtRandomSettings(window_tokens=5), models) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.order_LGP, again.order_LGP, strict=True))
    assert not torch.equal(*first.order_LGP), "layers have their own"
    for order_GP in first.order_LGP:
        assert order_GP[0, :5].tolist() == list(reversed(range(CACHED - 5, CACHED)))
        assert sorted(order_GP[0].tolist()) == list(range(CACHED))
    tokens = order(AtRandomSettings(of="tokens", window_tokens=5), models)
    assert sorted(tokens.order_P) == list(range(CACHED))
    drawn = [
        prompt_choices.build(AtRandomSettings(of="tokens", window_tokens=0)).order(
            Prompt(str(i), PROMPT.tokens), models
        )
        for i in range(400)
    ]
    # A binomial count of 400 draws at 9 of 39: seven standard deviations are 59.
    for place in (0, 20, CACHED - 1):
        assert abs(sum(place in one.kept(10) for one in drawn) - 400 * 9 / CACHED) < 59
