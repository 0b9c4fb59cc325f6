"""EAGLE-3.1: its norms from the equations, one by one; training and decoding agree with them, and wrong variants are seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.texts import Prompt
from drafttrain.drafters.eagle.layer import Norm
from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_drafter, eagle_target, packed
from tests.eval.decoding import decode, greedy

FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
EVERY = [tuple(flags) for count in range(5) for flags in itertools.combinations(FLAGS, count)]
TAPS = ([1, 2, 3], [2], [0, 3], [0, 1, 2, 3])
PAPER = {"fc_norm": True, "norm_output": True}
STEPS, LENGTH = 3, 8


@pytest.fixture(scope="module")
def target() -> Target:
    return eagle_target()


def rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


class Equations:
    """One chain of a drafter from the tensors of its file: no module of the drafter runs here but the rotation of positions."""

    def __init__(self, drafter: Any, *, twice: bool = False, together: bool = False, unnormed: bool = False) -> None:
        self.of = {name: tensor.detach() for name, tensor in drafter.state_dict().items()}
        self.config, self.drafter = drafter.config, drafter
        self.twice, self.together, self.unnormed = twice, together, unnormed

    def norm(self, name: str, states: Tensor) -> Tensor:
        return rms(states, self.of[f"{name}.weight"], self.config["rms_norm_eps"])

    def fused(self, features: list[Tensor]) -> Tensor:
        whole = torch.cat(features, dim=-1)
        if self.config["norm_before_fc"]:
            whole = self.norm("input_norm", whole)
        if self.config["fc_norm"]:
            pieces = whole.chunk(len(features), dim=-1)
            if self.together:
                weight = torch.cat([self.of[f"fc_norm.{i}.weight"] for i in range(len(features))])
                whole = rms(whole, weight, self.config["rms_norm_eps"])
            else:
                whole = torch.cat([self.norm(f"fc_norm.{i}", piece) for i, piece in enumerate(pieces)], dim=-1)
        return whole @ self.of["fc.weight"].T

    def layer(self, cache: list[tuple[Tensor, Tensor]], embedded: Tensor, hidden: Tensor, position: int) -> Tensor:
        heads, size = self.config["num_attention_heads"], self.config["head_dim"]
        normed = self.norm("midlayer.hidden_norm", hidden)
        inputs = torch.cat([self.norm("midlayer.input_layernorm", embedded), normed])
        turn = lambda states: self.drafter.midlayer.rotary.rotate(states[None, :, None], torch.tensor([[position]]))  # noqa: E731
        query, key, value = (
            (self.of[f"midlayer.self_attn.{part}_proj.weight"] @ inputs).view(-1, size) for part in "qkv"
        )
        query, key = turn(query)[0, :, 0], turn(key)[0, :, 0]
        cache.append((key, value))
        mixed = []
        for head in range(heads):
            group = head // (heads // len(key))
            scores = torch.stack([query[head] @ keys[group] for keys, _ in cache]) / math.sqrt(size)
            mixed.append(scores.softmax(0) @ torch.stack([values[group] for _, values in cache]))
        stream = (normed if self.config["norm_before_residual"] else hidden) + (
            self.of["midlayer.self_attn.o_proj.weight"] @ torch.cat(mixed)
        )
        inner = self.norm("midlayer.post_attention_layernorm", stream)
        gate, up, down = (self.of[f"midlayer.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return stream + down @ (torch.nn.functional.silu(gate @ inner) * (up @ inner))

    def logits(self, seen: Any, tokens: list[int], slot: int) -> list[Tensor]:
        """Return the logits of STEPS draft tokens after a slot."""
        cache: list[tuple[Tensor, Tensor]] = []
        hidden = self.fused([seen.hidden_BTD[tap][0] for tap in self.drafter.taps])
        embedded = self.drafter.embed(torch.tensor(tokens))
        for position in range(slot + 1):
            state = self.layer(cache, embedded[position + 1], hidden[position], position)
        found = []
        for step in range(STEPS):
            out = self.norm("norm", state)
            found.append(self.of["lm_head.weight"] @ (self.norm("norm", out) if self.twice else out))
            fed = out if self.config["norm_output"] and not self.unnormed else state
            if step + 1 < STEPS:
                state = self.layer(cache, embedded[slot + 2 + step], fed, slot + 1 + step)
        return found


@torch.no_grad()
def differences(target: Target, drafter: Any, equations: Equations) -> list[float]:
    """Return, by step, the largest difference of a logit between the rollout of training and the equations."""
    batch, _ = packed(target, drafter, (LENGTH,), width=LENGTH)
    tokens = batch.tokens_BT[0].tolist()
    states = drafter(replace(batch, num_depths=STEPS)).states_BTD
    worst = [0.0] * STEPS
    for slot in range(LENGTH - STEPS - 1):
        for step, wanted in enumerate(equations.logits(batch.target, tokens, slot)):
            ours = drafter.head(states[step + 1][0, slot][None], step + 1)[0]
            worst[step] = max(worst[step], float((ours - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("flags", EVERY, ids="+".join)
def test_training_computes_the_equations_with_every_set_of_norms(target: Target, flags: tuple[str, ...]) -> None:
    drafter = eagle_drafter("eagle3", target, **dict.fromkeys(flags, True))
    assert max(differences(target, drafter, Equations(drafter))) < 1e-10


@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_training_computes_the_equations_with_every_number_of_taps(target: Target, taps: list[int]) -> None:
    drafter = eagle_drafter("eagle3", target, taps=taps, **PAPER)
    assert max(differences(target, drafter, Equations(drafter))) < 1e-10


@pytest.mark.parametrize(
    ("wrong", "first", "later"),
    [
        ({"twice": True}, True, True),
        ({"together": True}, True, True),
        # Step 1 does not depend on what is fed back.
        ({"unnormed": True}, False, True),
    ],
)
def test_control_a_wrong_norm_is_seen(target: Target, wrong: dict[str, bool], first: bool, later: bool) -> None:
    drafter = eagle_drafter("eagle3", target, **PAPER)
    found = differences(target, drafter, Equations(drafter, **wrong))
    assert (found[0] > 1e-3) == first
    assert (min(found[1:]) > 1e-3) == later


def test_why_the_weights_of_the_norms_must_not_be_one(target: Target) -> None:
    """With weights of one a state that is normed twice is the state normed once."""
    drafter = eagle_drafter("eagle3", target, **PAPER)
    torch.nn.init.ones_(drafter.norm.weight)
    assert max(differences(target, drafter, Equations(drafter, twice=True))) < 1e-4


def logits_by_step(target: Target, drafter: Any) -> list[Tensor]:
    batch, _ = packed(target, drafter, (LENGTH,), width=LENGTH)
    with torch.no_grad():
        states = drafter(replace(batch, num_depths=STEPS)).states_BTD
        return [drafter.head(states[step][0, : LENGTH - STEPS - 1], step) for step in range(1, STEPS + 1)]


def test_the_first_step_does_not_depend_on_what_is_fed_back(target: Target) -> None:
    off, on = (logits_by_step(target, eagle_drafter("eagle3", target, norm_output=flag)) for flag in (False, True))
    assert torch.equal(off[0], on[0])
    assert (off[1] - on[1]).abs().max() > 1e-3


def features_of(drafter: Any, change: Callable[[int, Tensor], Tensor] = lambda place, piece: piece) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    width = drafter.config["hidden_size"]
    pieces = [torch.randn(1, 6, width, generator=generator, dtype=torch.float64) for _ in drafter.taps]
    return torch.cat([change(place, piece) for place, piece in enumerate(pieces)], dim=-1)


def test_norms_of_one_on_normed_features_are_plain_eagle3(target: Target) -> None:
    drafter, plain = (eagle_drafter("eagle3", target, fc_norm=flag) for flag in (True, False))
    plain.fc.load_state_dict(drafter.fc.state_dict())
    without_eps(drafter)
    ones = torch.ones(drafter.config["hidden_size"], dtype=torch.float64)
    normed = lambda place, piece: rms(piece, ones, 0.0)  # noqa: E731
    found = drafter.fused(features_of(drafter, normed))
    assert (found - plain.fused(features_of(plain, normed))).abs().max() > 1e-3  # its weights are not ones yet
    for norm in drafter.fc_norm:
        torch.nn.init.ones_(norm.weight)
    assert torch.allclose(
        drafter.fused(features_of(drafter, normed)), plain.fused(features_of(plain, normed)), atol=1e-12
    )
    assert not torch.allclose(drafter.fused(features_of(drafter)), plain.fused(features_of(plain)), atol=1e-2)


def without_eps(drafter: Any) -> None:
    for module in drafter.modules():
        if isinstance(module, Norm):
            module.eps = 0.0


@pytest.mark.parametrize(("flag", "same"), [("fc_norm", True), (None, False), ("norm_before_fc", False)])
@pytest.mark.parametrize("taps", [[1, 2, 3], [0, 3]], ids=str)
def test_the_scale_of_one_feature_matters_unless_each_is_normed(
    target: Target, taps: list[int], flag: str | None, same: bool
) -> None:
    drafter = eagle_drafter("eagle3", target, taps=taps, **({} if flag is None else {flag: True}))
    without_eps(drafter)
    before = drafter.fused(features_of(drafter))
    larger = drafter.fused(features_of(drafter, lambda place, piece: piece * 100 if place == 1 else piece))
    assert torch.allclose(before, larger, atol=1e-12) == same


@torch.no_grad()
def fed_back_norms(target: Target, drafter: Any, steps: int = 16) -> list[float]:
    """Return the largest norm of the state that each step feeds back, after the first."""
    batch, _ = packed(target, drafter, (24,), width=24)
    states = drafter(replace(batch, num_depths=steps)).states_BTD
    return [float(drafter.fed_back(state[0, : 24 - steps - 1]).norm(dim=-1).max()) for state in states.values()]


def test_the_fed_back_state_stays_bounded_over_many_steps(target: Target) -> None:
    """By the final norm: its length is at most its largest weight times the root of the width."""
    found = {flag: fed_back_norms(target, eagle_drafter("eagle3", target, norm_output=flag)) for flag in (True, False)}
    weight = eagle_drafter("eagle3", target).norm.weight.detach()
    bound = float(weight.abs().max()) * math.sqrt(len(weight))
    assert max(found[True]) <= bound
    assert max(found[False]) > bound
    assert found[False][-1] > 2 * found[False][0]


@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_decoding_with_any_number_of_taps_is_lossless(target: Target, taps: list[int]) -> None:
    drafter = eagle_drafter("eagle3", target, taps=taps, **PAPER)
    prompts = [Prompt("a", [5, 9, 2, 30]), Prompt("b", [8])]
    found = decode(target, drafter.proposer(target), prompts=prompts, new=10, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 10) for prompt in prompts]
