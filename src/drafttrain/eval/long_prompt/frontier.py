"""Measures a frontier: how far the target with a reduced prompt is from itself with the whole one, by how much is kept.

V = vocabulary, T = tokens of the target's text, H = heads, G = key-value heads, P = tokens before the prompt's last one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.console import progress, say
from drafttrain.core.errors import CheckpointError, DataError, RecipeError
from drafttrain.core.probability import without_padding
from drafttrain.core.provenance import provenance
from drafttrain.core.random import stream
from drafttrain.core.registry import component_mapping
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.checkers import checkers
from drafttrain.data_gen.decoding import continued
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine, Prefill, whole_prompts
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.kept import Amount, KeptPrompts, Order
from drafttrain.eval.long_prompt.look_ahead import Models
from drafttrain.eval.long_prompt.result import LongPromptResult, PromptCounts, difference, point
from drafttrain.eval.long_prompt.settings import LongPromptSettings
from drafttrain.eval.prompts import name_of
from drafttrain.eval.proposers import label_of
from drafttrain.eval.proposers.language_model import language_model_of
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.quality import solved
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.statistics import share_interval
from drafttrain.target_model import Target
from drafttrain.target_model.observed_attention import attention_to

LEAST_TOKENS = 2
"""Of a prompt: one that may be left out, and the last one."""


@dataclass
class _Arm:
    """A choice at all amounts."""

    settings: Any
    counts: dict[Amount, list[PromptCounts]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label_of(self.settings)


@torch.no_grad()
def frontier(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    amounts: Sequence[Amount],
    *,
    settings: LongPromptSettings | None = None,
    evaluation: EvalSettings | None = None,
    name: str = "drafter",
) -> LongPromptResult:
    """Measure each choice at each amount, on texts that the target writes at temperature 1 after the whole prompts.

    With `evaluation.checker`, greedy outputs are checked too.

    Args:
        drafter: A language model that reads the target's tokens.
        amounts: How much of each prompt is kept. LOSSY, but for the whole.
        evaluation: `max_new_tokens`, `seed` and `checker` count.
        name: Of the drafter, in the result.

    Raises:
        CheckpointError: The drafter is no language model of the target's tokens, or the attention of a model cannot be observed.
        DataError: A prompt is too short, or has no answer that the checker can read.
        RecipeError: Settings that contradict each other.
    """
    settings, evaluation = settings or LongPromptSettings(), evaluation or EvalSettings()
    if problems := settings.check():
        raise RecipeError("arguments", problems)
    measured = _Measured(target, drafter, evaluation)
    measured.check(prompts)
    _warn_of_windows(settings.choices, amounts, [len(prompt.tokens) for prompt in prompts])
    arms = [_Arm(one, {amount: [] for amount in amounts}) for one in settings.choices]
    with progress("reading prompts", total=len(prompts), unit="prompts") as bar:
        for prompt in prompts:
            measured.add(prompt, arms)
            bar.advance()
    whole = measured.whole_solved
    return LongPromptResult(
        drafter=name,
        target=target.name,
        prompts=name_of(evaluation.prompts),
        num_prompts=len(prompts),
        max_new_tokens=evaluation.max_new_tokens,
        choices=[component_mapping(one) for one in settings.choices],
        points=[
            point(arm.label, arm.settings.of, str(amount), arm.counts[amount], whole)
            for arm in arms
            for amount in amounts
        ],
        differences=[
            difference((arm.label, other.label), str(amount), arm.counts[amount], other.counts[amount])
            for arm in arms
            for other in arms
            for amount in amounts
            if arm.settings.of == other.settings.of
            if arm.settings.reads_drafter and not other.settings.reads_drafter
        ],
        whole_task=share_interval(whole, [1] * len(whole)) if whole else None,
        provenance=provenance(),
    )


def _warn_of_windows(choices: Sequence[Any], amounts: Sequence[Amount], lengths: Sequence[int]) -> None:
    """Name every choice that has nothing to choose at some amount, because its window alone is as large."""
    for choice in choices:
        for amount in amounts:
            parts = [kept for length in lengths if (kept := amount.of(length)) < length]
            if within := sum(kept <= choice.num_kept_first for kept in parts):
                say(
                    f"note: {label_of(choice)} ({choice.of}): --keep {amount} leaves no room beside the window of "
                    f"{choice.window_tokens} tokens in {within} of {len(lengths)} prompts: there it is a last window. "
                    f"Set a smaller window_tokens, or keep more"
                )


class _Measured:
    """The target, read with whole and with reduced prompts."""

    def __init__(self, target: Target, drafter: Drafter, evaluation: EvalSettings) -> None:
        self._target = target
        self._new, self._seed = evaluation.max_new_tokens, evaluation.seed
        language_model = language_model_of(drafter, "long-prompt")
        self._models = Models.of(target, language_model, seed=self._seed, look_ahead_tokens=self._new)
        self._checker = None if evaluation.checker is None else checkers.build(evaluation.checker)
        self.whole_solved: list[float] = []
        """1 for every prompt that the greedy output after the whole prompt solves."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that are too short, and models that cannot read some columns of a cache."""
        if short := [prompt.id for prompt in prompts if len(prompt.tokens) < LEAST_TOKENS]:
            raise DataError(
                f"prompts of fewer than {LEAST_TOKENS} tokens have nothing to leave out: {', '.join(short)}"
            )
        longest = max(len(prompt.tokens) for prompt in prompts) + self._new
        self._target.check_length(longest, what="prompt and eval.max_new_tokens")
        for lm in (self._models.target, self._models.drafter):
            if why := lm.why_one_at_a_time(longest):
                raise CheckpointError(f"{lm.name}: parts of a prompt cannot be kept: {why}")

    def add(self, prompt: Prompt, arms: Sequence[_Arm]) -> None:
        """Measure a prompt with every choice and amount."""
        lm, length = self._models.target, len(prompt.tokens)
        text = self._text(prompt)
        whole_TV = self._rows(prompt, text, whole_prompts)
        whole_prompts(lm, [prompt], TargetNeeds())
        read = [prompt.tokens[-1], *text[:-1]]
        by_head_LHP = attention_to(lm, read, after=length - 1, summary=lambda weights_HTP: weights_HTP.sum(1))
        pairs = zip(by_head_LHP, lm.cache.heads, strict=True)
        mass_LGP = [mass_HP.unflatten(0, (groups, -1)).sum(1) for mass_HP, groups in pairs]
        mass = sum(float(mass_GP.sum()) for mass_GP in mass_LGP)
        if self._checker is not None:
            self.whole_solved += self._solved(prompt, whole_prompts)
        for arm in arms:
            whole_prompts(lm, [prompt], TargetNeeds())
            order: Order = prompt_choices.build(arm.settings).order(prompt, self._models)
            for amount, counts in arm.counts.items():
                prefill, kept = KeptPrompts({prompt.id: order}, amount), amount.of(length)
                rows_TV = self._rows(prompt, text, prefill)
                counts.append(
                    PromptCounts(
                        num_kept=kept,
                        num_prompt_tokens=length,
                        distance=float((rows_TV - whole_TV).abs().sum()) / 2,
                        num_tokens=len(text),
                        kept_mass=order.kept_mass(mass_LGP, kept),
                        mass=mass,
                        solved=None if self._checker is None else self._solved(prompt, prefill)[0],
                    )
                )

    def _text(self, prompt: Prompt) -> list[int]:
        """Return what the target writes at temperature 1 after the whole prompt."""
        generator = stream(self._seed, "text", prompt.id)
        (text,) = continued(
            [prompt.tokens],
            [self._models.target],
            num_tokens=self._target.num_tokens,
            ends=self._target.eos_token_ids,
            sampling=Sampling(1.0),
            limits=[self._new],
            numbers_BT=torch.rand(1, self._new, generator=generator, dtype=torch.float64),
        )
        return text

    def _rows(self, prompt: Prompt, text: Sequence[int], prefill: Prefill) -> Tensor:
        """Return the distributions of the tokens of a text after a prompt that is read in this way."""
        lm = self._models.target
        prefill(lm, [prompt], TargetNeeds())
        (seen,) = lm.forward([[prompt.tokens[-1], *text[:-1]]])
        assert seen.logits_BTV is not None
        return without_padding(seen.logits_BTV[0], num_tokens=self._target.num_tokens).double().softmax(dim=-1)

    def _solved(self, prompt: Prompt, prefill: Prefill) -> list[float]:
        """Return [1] if the greedy output solves the prompt, else [0]."""
        engine = Engine(
            self._target,
            NoDraft(),
            rule=Lossless(),
            policy=FixedLength(),
            sampling=Sampling(0.0),
            max_new_tokens=self._new,
            seed=self._seed,
            prefill=prefill,
        )
        assert self._checker is not None
        return solved(self._checker, self._target.tokenizer, [prompt], engine.generate([prompt]))
