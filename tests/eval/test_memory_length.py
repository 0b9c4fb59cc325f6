"""The memory of decoding: predicted against counted tensors; and the length policy that keeps within a limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.core.proposals import Budget, Context, Verdict, fixed_chain
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.arms import Arm
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.memory import MemoryLength, MemoryLengthSettings
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from drafttrain.training.step_cost import Counted
from tests.conftest import byte_tokenizer
from tests.drafters.eagle_models import eagle_drafter
from tests.eval.decoding import greedy

WIDE = 16384


def llama(vocab_size: int, *, hidden_size: int = 32, num_layers: int = 4, heads: int = 2) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def target_of(vocab_size: int, **sizes: Any) -> Target:
    target = Target(llama(vocab_size, **sizes), byte_tokenizer(), name="tiny", fingerprint="")
    target.__dict__["num_tokens"] = vocab_size
    return target


def language_model(target: Target) -> Any:
    return CausalLMDrafter(llama(target.vocab_size, hidden_size=16, num_layers=1))


SETTINGS: dict[str, Any] = {
    "long text, greedy chain": (257, 2 * 64, language_model, FixedLengthSettings(4), 0.0, 640),
    "many tokens, sampled chain": (WIDE, 32, language_model, FixedLengthSettings(8), 1.0, 32),
    "many tokens, a language model's tree": (WIDE, 32, language_model, TreeSettings(24, 4, 3), 1.0, 32),
    "many tokens, EAGLE's tree": (
        WIDE,
        32,
        lambda target: eagle_drafter("eagle", target).float(),
        TreeSettings(24, 4, 3),
        0.0,
        32,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_predicted_peak_is_the_counted_one(name: str) -> None:
    """Of the rounds, beyond the weights: counted over all tensors from their allocation to their release."""
    vocab_size, width, drafter_of, length, temperature, prompt = SETTINGS[name]
    target = target_of(vocab_size, hidden_size=width)
    drafter, sampling, settings = drafter_of(target), Sampling(temperature), EvalSettings(max_new_tokens=12)
    arm = Arm.create("", drafter, target, sampling, settings, length=length, stop_tokens=())
    peaks: list[int] = []
    with Counted() as counted:

        def on_round(*_: Any) -> None:
            peaks.append(counted.peak)
            counted.peak = counted.now

        arm.engine.generate([Prompt("", [1 + place % 50 for place in range(prompt)])], on_round=on_round)
    memory = DecodingMemory.of(target, drafter, sampling, arm.ledger.events)
    draft = arm.engine.policy.budget(Context("", [0], 1))
    predicted = memory.peak(draft, prompt + 8, prompt=prompt) - memory.weight_bytes
    # The first round's peak is that of the prefill.
    assert predicted == pytest.approx(max(peaks[1:]), rel=0.1)
    # A prediction without the rows over the vocabulary, or without caches, is far off.
    wrong = replace(memory, vocab_size=0) if vocab_size == WIDE else replace(memory, events=())
    assert wrong.peak(draft, prompt + 8, prompt=prompt) - memory.weight_bytes != pytest.approx(max(peaks[1:]), rel=0.5)


def memory_of(**changed: Any) -> DecodingMemory:
    return replace(DecodingMemory(10**6, (), vocab_size=1000, element_bytes=4, sampled=False), **changed)


def test_the_largest_draft_is_the_one_that_a_scan_finds() -> None:
    memory, wanted = memory_of(), Budget(24, 5, 4)
    for limit in range(10**6, 10**6 + 300_000, 9_000):
        fitting = [
            (depth, nodes)
            for depth in range(1, 6)
            for nodes in range(depth, wanted.within(depth).nodes + 1)
            if memory.peak(Budget(nodes, depth, 4), 100) <= limit
        ]
        found = memory.largest(limit, wanted, 100)
        assert (found.depth, found.nodes) == max(fitting, default=(0, 0))
    assert memory.largest(10**9, wanted, 100) == wanted
    assert memory.largest(10**6, wanted, 100).nodes == 0


def test_a_longer_text_leaves_room_for_a_smaller_draft() -> None:
    settings = MemoryLengthSettings(gigabytes=0.00115)
    policy = MemoryLength(settings)
    policy.fit(memory_of())
    sizes = [policy.budget(Context("", [0] * length, 1)).nodes for length in (10, 1000, 4000, 16_000)]
    assert sizes[0] > 0
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert MemoryLength(MemoryLengthSettings()).budget(Context("", [0] * 16_000, 1)).nodes == 24


def test_only_depths_that_pay_are_drafted() -> None:
    policy = MemoryLength(MemoryLengthSettings(num_draft_tokens=6, depth=6, width=1))
    policy._level_cost, policy._target_cost = 0.1, 1.0
    assert policy.paying_depth() == 6
    for _ in range(50):
        policy.observe(
            Verdict([0, 1, 2], [1, 2, 3], "reject", fixed_chain(0, [0] * 6))
        )  # two accepted, the third never
    rates = [(1 + min(depth, 2)) / (1 + 0.1 * depth) for depth in range(7)]
    assert policy.paying_depth() == max(range(7), key=rates.__getitem__) == 2
    policy._level_cost = 3.0
    assert policy.paying_depth() == 0
    assert policy.budget(Context("", [0], 1)).nodes == 0


def test_decoding_within_a_limit_is_the_targets_own_text() -> None:
    target = target_of(257)
    drafter, prompt = CausalLMDrafter(target.model), Prompt("", [3, 1, 2])
    free = DecodingMemory.of(target, drafter, Sampling(), ())
    limit = (free.weight_bytes + free.vocab_size * 4 * 6 + 200_000) / 1e9
    arm = Arm.create(
        "",
        drafter,
        target,
        Sampling(),
        EvalSettings(max_new_tokens=24),
        length=MemoryLengthSettings(gigabytes=limit, width=1, num_draft_tokens=5),
        stop_tokens=(),
    )
    (found,) = arm.engine.generate([prompt])
    assert found.tokens == greedy(target, prompt, 24)
    assert max(one.num_draft_tokens for one in found.rounds) > 0


def test_it_is_calibrated_as_every_evaluation_calibrates_it() -> None:
    target = target_of(257)
    settings = EvalSettings(max_new_tokens=6)
    length = MemoryLengthSettings(num_draft_tokens=4, depth=2)
    arm = Arm.create("", language_model(target), target, Sampling(), settings, length=length, stop_tokens=())
    arm.warm_up([Prompt("", [1, 2, 3])])
    assert arm.engine.policy._level_cost > 0
