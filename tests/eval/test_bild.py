"""BiLD: fallback and rollback equal a slow plain version, and their limits are the target, the drafter and the lossless rule.

V = vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from drafttrain.core.proposals import DraftStep, Exactness, NodeKind, chain, fixed_chain, fixed_tree
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.acceptance.rollback import Rollback, RollbackSettings, distances
from drafttrain.eval.length.fallback import Fallback, FallbackSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, V, chi_square, decode, greedy, noisy, small_target

NEW = 30


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture(scope="module")
def small() -> Any:
    return random_llama(seed=4, num_layers=1).double()


def bild(
    target: Target, small: Any, *, fallback: float, rollback: float | None, most: int = 10, **options: Any
) -> list[list[int]]:
    found = decode(
        target,
        ChainProposer(small, target_vocab_size=V),
        policy=Fallback(FallbackSettings(fallback, most)),
        rule=Rollback(RollbackSettings(rollback)),
        new=NEW,
        **{"stop_tokens": ()} | options,
    )
    return [list(one.tokens) for one in found]


def written_by_hand(target: Target, small: Any, prompt: Prompt, *, fallback: float, rollback: float, most: int) -> Any:
    """Decode as BiLD does, greedily, without caches: the drafter's tokens up to the fallback, one pass of the target over them."""
    text = list(prompt.tokens)

    def row(model: Any, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].softmax(-1)

    while len(text) < len(prompt.tokens) + NEW:
        drafted: list[int] = []
        room = len(prompt.tokens) + NEW - len(text) - 1
        while len(drafted) < min(most, room):
            q_V = row(small, text + drafted)
            if float(q_V.max()) < fallback:
                break
            drafted.append(int(q_V.argmax()))
        for place, token in enumerate([*drafted, None]):
            p_V = row(target.model, text + drafted[:place])
            if token is None or (token != int(p_V.argmax()) and -math.log(float(p_V[token])) > rollback):
                text += [*drafted[:place], int(p_V.argmax())]
                break
    return text[len(prompt.tokens) :]


@pytest.mark.parametrize(("fallback", "rollback"), [(0.05, 4.0), (0.1, 5.0)])
def test_greedy_decoding_is_that_of_the_plain_version(target, small, fallback, rollback):
    found = bild(target, small, fallback=fallback, rollback=rollback, most=4)
    by_hand = [
        written_by_hand(target, small, prompt, fallback=fallback, rollback=rollback, most=4) for prompt in PROMPTS
    ]
    assert found == by_hand
    # The controls: both thresholds matter here.
    assert found != bild(target, small, fallback=fallback, rollback=rollback / 4, most=4)
    assert found != bild(target, small, fallback=4 * fallback, rollback=rollback, most=4)


def test_rollback_null_never_rolls_back():
    p_NV = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).double()
    for sampled in (False, True):
        draft = fixed_chain(1, [2, 0])
        if sampled:
            draft = chain([1, 2, 0], kind=NodeKind.SAMPLED, q_rows_RV=torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
        for never in (None, math.inf):
            found = Rollback(RollbackSettings(never))(draft, TargetProbs.of(p_NV), None, torch.Generator())
            assert found == ([0, 1, 2], 0)
        # The control: the target gives the first token no probability.
        assert Rollback(RollbackSettings(1e9))(draft, TargetProbs.of(p_NV), None, torch.Generator())[0] == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollback_at_0_is_lossless_token_for_token(target, temperature):
    drafter = noisy(target.model, 0.05)
    found = bild(target, drafter, fallback=0.02, rollback=0, temperature=temperature)
    lossless = decode(
        target,
        ChainProposer(drafter, target_vocab_size=V),
        policy=Fallback(FallbackSettings(0.02, 10)),
        rule=Lossless(),
        new=NEW,
        stop_tokens=(),
        temperature=temperature,
    )
    assert found == [list(one.tokens) for one in lossless]
    assert any(one.num_accepted for generation in lossless for one in generation.rounds)
    assert found != bild(target, drafter, fallback=0.02, rollback=5, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fallback_above_1_is_the_target(target, small, temperature):
    found = bild(target, small, fallback=1.01, rollback=None, temperature=temperature)
    plain = decode(target, NoDraft(), new=NEW, stop_tokens=(), temperature=temperature)
    assert found == [list(one.tokens) for one in plain]
    assert found != bild(target, small, fallback=0.05, rollback=None, temperature=temperature)


def test_fallback_at_0_is_the_drafter(target, small):
    """The last token that the length allows is the target's; a text that ends earlier is the drafter's alone."""
    alone = Target(small, byte_tokenizer(), name="small", fingerprint="")
    own = [greedy(alone, prompt, NEW) for prompt in PROMPTS]
    found = bild(target, small, fallback=0, rollback=None, most=NEW)
    assert [text[:-1] for text in found] == [text[:-1] for text in own]
    stop = own[0][NEW // 2]
    ended = bild(target, small, fallback=0, rollback=None, most=NEW, stop_tokens=(stop,))
    assert ended[0] == own[0][: own[0].index(stop) + 1]
    assert found != bild(target, small, fallback=0, rollback=2.0, most=NEW)


def test_the_drafter_continues_while_its_likeliest_token_reaches_the_threshold():
    policy = Fallback(FallbackSettings(0.5))
    answers = [
        policy.more(DraftStep(0, 1, torch.tensor(q).log())) for q in ([0.51, 0.49, 0], [0.49, 0.48, 0.03], [1.0, 0, 0])
    ]
    assert answers == [True, False, True]


def test_the_distance_is_at_temperature_1_whatever_the_sampling():
    logits_NV = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    tree = fixed_tree(0, [(1, 0), (4, 0), (2, 1)])
    by_hand = [0.0, *(-float(logits_NV[parent].log_softmax(-1)[token]) for parent, token in [(0, 1), (0, 4), (1, 2)])]
    for sampling in (Sampling(), Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=2)):
        assert distances(tree, TargetProbs(logits_NV, sampling, num_tokens=5)) == pytest.approx(by_hand)


def test_a_larger_threshold_never_rolls_back_earlier():
    grew = 0
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        probs = TargetProbs(3 * torch.randn(7, 6, generator=random), Sampling(), num_tokens=6)
        draft = fixed_chain(0, torch.randint(6, (6,), generator=random).tolist())
        lengths = [
            len(Rollback(RollbackSettings(threshold))(draft, probs, None, random)[0])
            for threshold in (0, 0.5, 2, 5, None)
        ]
        assert lengths == sorted(lengths)
        grew += lengths[-1] > lengths[0]
    assert grew > 5


def test_it_is_lossy_and_labelled_so():
    assert Rollback.exactness is Exactness.LOSSY
    model = small_target().model
    proposer = ChainProposer(noisy(model, 0.15), target_vocab_size=8)

    def use_the_rule(engine: Any) -> None:
        engine.rule = Rollback()

    assert chi_square(model, proposer, 1.0, samples=1000, prepare=use_the_rule) < 1e-3
