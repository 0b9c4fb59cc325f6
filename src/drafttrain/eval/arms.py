"""Arms: ways of decoding the same prompts, in turns, and the baseline that their speed is measured against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafttrain.core.console import progress
from drafttrain.core.generations import Generation
from drafttrain.core.images import Image
from drafttrain.core.roles import CostAware, Remembers
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.decoding_memory import DecodingMemory, FitsMemory
from drafttrain.eval.engine import Engine
from drafttrain.eval.generate import generate as transformers_generate
from drafttrain.eval.later_turns import next_prompts
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length import length_policies
from drafttrain.eval.parity import parity
from drafttrain.eval.pipelined import scheduled
from drafttrain.eval.proposers import TrainingFree
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.unfinished import DecodedByArm, DecodedGroup, Event, Unfinished
from drafttrain.target_model import Target

CALIBRATION_PROMPTS = 2
"""Decoded once more after the warm-up, for a length policy or a proposer that weighs tokens against time."""


Source = Drafter | TrainingFree
"""Makes the proposer of an arm."""


@dataclass
class Arm:
    """One way of decoding the same prompts: plain, or with one drafter or training-free proposer."""

    name: str
    engine: Engine
    ledger: Ledger
    length: Any
    """Settings of its length policy."""
    target: Target
    """The given target, or the drafter's own: with the adapters that it was exported with."""
    source: Source
    generations: list[Generation] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    """Of the generations: those of later turns follow the target's own answers."""

    @classmethod
    def create(
        cls,
        name: str,
        source: Source,
        target: Target,
        sampling: Sampling,
        settings: EvalSettings,
        *,
        length: Any,
        stop_tokens: Sequence[int] | None = None,
    ) -> Arm:
        """Return an arm that has not decoded yet.

        Args:
            stop_tokens: Tokens that end a text; None: the target's own.
        """
        ledger, policy = Ledger(), length_policies.build(length)
        if isinstance(policy, FitsMemory):
            policy.fit(DecodingMemory.of(target, source, sampling, ledger.events))
        proposer = source.proposer(target, ledger.append)
        if isinstance(source, Drafter):
            proposer = scheduled(settings.schedule, proposer, max_new_tokens=settings.max_new_tokens)
        engine = Engine(
            target,
            proposer,
            rule=acceptance_rules.build(settings.rule),
            policy=policy,
            sampling=sampling,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            listener=ledger.append,
            stop_tokens=stop_tokens,
        )
        return cls(name, engine, ledger, length, target, source)

    @property
    def measuring(self) -> list[CostAware]:
        """Its length policy and its proposer, as far as they weigh tokens against time."""
        return [one for one in (self.engine.policy, self.engine.proposer) if isinstance(one, CostAware)]

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Decode the first prompt, and calibrate what weighs tokens against time. Nothing else is remembered."""
        self.engine.generate(prompts[:1])
        if measuring := self.measuring:
            self.ledger.events.clear()
            generations = self.engine.generate(prompts[:CALIBRATION_PROMPTS])
            for one in measuring:
                one.calibrate(generations, self.ledger.events)
        if isinstance(self.engine.proposer, Remembers):
            self.engine.proposer.forget()
        self.ledger.events.clear()

    def tokens_and_seconds(self) -> tuple[list[int], list[float]]:
        """Return new tokens and time of each prompt."""
        return [len(one.tokens) for one in self.generations], [one.seconds for one in self.generations]

    @property
    def images(self) -> list[Sequence[Image]]:
        """The images of each prompt."""
        return [prompt.images for prompt in self.prompts]

    @property
    def units(self) -> list[str]:
        """What each prompt belongs to in intervals: its conversation."""
        return [prompt.unit for prompt in self.prompts]


LEAST_GROUPS = 4
"""Groups of prompts that are decoded however long they take: an interval needs several."""


def decode(
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    *,
    generate: int,
    unfinished: Unfinished | None = None,
    within_seconds: float | None = None,
) -> list[Generation]:
    """Decode every prompt with every arm, in turns whose order alternates; then the later turns of conversations.

    All arms read the same later turns: those after the first arm's answers.

    Args:
        arms: The first one decodes with the target alone.
        generate: Number of prompts that transformers' generate decodes too, if they are decoded one at a time.
        unfinished: Groups of prompts that an interrupted evaluation decoded; None: nothing is stored.
        within_seconds: Begin no further group after this time, warm-up not counted, once there are `LEAST_GROUPS`.

    Returns:
        The outputs of transformers' generate with the target of the first arm.
    """
    by_generate = prompts[:generate] if settings.batch_size == 1 and arms[0].target.generates else []
    for arm in arms:
        arm.warm_up(prompts)
    for prompt in by_generate[:1]:
        transformers_generate(prompt, arms[0].target, max_new_tokens=settings.max_new_tokens)
    generated: list[Generation] = []
    stored = unfinished or Unfinished(None, {})
    total = sum(1 + len(prompt.questions) for prompt in prompts)
    temperature = arms[0].engine.sampling.temperature
    began = time.monotonic()
    with progress(f"decoding at temperature {temperature:g}", total=total, unit="prompts") as bar:
        for number, group in enumerate(_groups(prompts, arms[0], settings.batch_size)):
            late = within_seconds is not None and time.monotonic() - began > within_seconds
            if late and number >= LEAST_GROUPS:
                break
            found = stored.read(temperature, number)
            if found is None:
                order = arms if number % 2 == 0 else list(reversed(arms))
                found = _decode_group(arms, order, group, by_generate[number : number + 1], settings)
                stored.store(temperature, number, found)
            for arm, decoded in zip(arms, found.arms, strict=True):
                arm.generations += decoded.generations
                arm.prompts += group
                arm.ledger.events += [event.forward_event() for event in decoded.events]
            generated += found.generated
            bar.advance(len(group))
    return generated


def _groups(prompts: Sequence[Prompt], plain: Arm, size: int) -> Iterator[Sequence[Prompt]]:
    """Yield groups of prompts, then those of the next turn, which follow what this arm answered meanwhile."""
    while prompts:
        yield from (prompts[start : start + size] for start in range(0, len(prompts), size))
        answers, new = plain.generations[-len(prompts) :], plain.engine.max_new_tokens
        prompts = next_prompts(prompts, answers, plain.target, max_new_tokens=new)


def _decode_group(
    arms: Sequence[Arm],
    order: Sequence[Arm],
    group: Sequence[Prompt],
    by_generate: Sequence[Prompt],
    settings: EvalSettings,
) -> DecodedGroup:
    """Decode a group of prompts with every arm in this order, then by transformers' generate."""
    decoded = {}
    for arm in order:
        before = len(arm.ledger.events)
        generations = arm.engine.generate(group)
        decoded[id(arm)] = DecodedByArm(generations, [Event.of(event) for event in arm.ledger.events[before:]])
        del arm.ledger.events[before:]
    generated = [
        transformers_generate(prompt, arms[0].target, max_new_tokens=settings.max_new_tokens) for prompt in by_generate
    ]
    return DecodedGroup([decoded[id(arm)] for arm in arms], generated)


@dataclass(frozen=True)
class Baseline:
    """The target alone, decoded in turns with the drafters: tokens and seconds of the first prompts."""

    name: str
    tokens: Sequence[int]
    seconds: Sequence[float]


def faster_baseline(plain: Arm, generated: Sequence[Generation]) -> Baseline:
    """Return the faster of plain decoding and transformers' generate on the same prompts.

    transformers' generate counts only where it writes the same text as plain decoding.
    """
    if (
        generated
        and writes_same_text(plain, generated)
        and tokens_per_second(generated) > tokens_per_second(plain.generations[: len(generated)])
    ):
        name, found = "transformers' generate", generated
    else:
        name, found = "plain decoding, same engine", plain.generations
    return Baseline(name, [len(g.tokens) for g in found], [g.seconds for g in found])


def writes_same_text(plain: Arm, generated: Sequence[Generation]) -> bool:
    """Return whether transformers' generate writes the same text as plain decoding; near ties are not counted."""
    count = len(generated)
    return parity(plain.generations[:count], generated, plain.target, images=plain.images[:count]).lossless


def tokens_per_second(generations: Sequence[Generation]) -> float:
    """Return the new tokens of all outputs over the time of all."""
    return sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations)
