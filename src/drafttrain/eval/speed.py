"""Wall-clock speed of a drafter beside the target alone, on the same prompts in turns: the figures of `eval`, without replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm, decode, faster_baseline, tokens_per_second
from drafttrain.eval.figures import speedup
from drafttrain.eval.parity import Parity, parity
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.result import Speedup
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target


@dataclass(frozen=True)
class Speed:
    """What was measured of one drafter."""

    speedup: Speedup
    """Over the faster of plain decoding and transformers' generate."""
    with_drafter: float
    """Tokens per second."""
    plain: float
    transformers_generate: float | None
    """None: not measured, because the text is sampled."""
    block_efficiency: float
    parity: Parity | None
    """None: the text is sampled."""

    @property
    def without_drafter(self) -> float:
        """Tokens per second of the baseline."""
        return self.with_drafter / self.speedup.value


def measure(
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    *,
    within_seconds: float | None = None,
) -> Speed:
    """Decode the prompts with the drafter and without, in turns, after a warm-up.

    Args:
        target: The target that the drafter drafts for: with its adapters.
        settings: Their first temperature counts. Prompts are decoded one at a time.
        within_seconds: Begin no further prompt after this time, once there are four; None: decode all.
    """
    sampling = Sampling(settings.temperatures[0])
    plain, drafted = (
        Arm.create(name, one, target, sampling, settings, length=settings.length)
        for name, one in (("plain", PLAIN), ("drafter", drafter))
    )
    greedy = sampling.temperature == 0
    generated = decode(
        [plain, drafted],
        prompts,
        settings,
        generate=len(prompts) if greedy else 0,
        within_seconds=within_seconds,
    )
    return Speed(
        speedup=speedup(drafted, faster_baseline(plain, generated)),
        with_drafter=tokens_per_second(drafted.generations),
        plain=tokens_per_second(plain.generations),
        transformers_generate=tokens_per_second(generated) if generated else None,
        block_efficiency=tokens_a_round(drafted.generations),
        parity=parity(plain.generations, drafted.generations, target, images=plain.images) if greedy else None,
    )


def tokens_a_round(generations: Sequence[Generation]) -> float:
    """Return the block efficiency over whole outputs."""
    return sum(len(one.tokens) for one in generations) / sum(len(one.rounds) for one in generations)
