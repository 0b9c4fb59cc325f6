"""BiLD in the evaluator's own loop, so that it has a frontier beside those of the other cascades. LOSSY."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from drafttrain.core.device_time import Span as DeviceSpan
from drafttrain.core.generations import Round
from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.rollback import Rollback, RollbackSettings
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.router import CascadeSettings, Decoder, Pair
from drafttrain.eval.cascade.spans import CascadeGeneration, Unit
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fallback import Fallback, FallbackSettings


@dataclass
class BildSettings(CascadeSettings):
    """Fallback and rollback (BiLD)."""

    fallback: float = setting(
        0.6, help="As `threshold` of the length policy `fallback`: above 1 the large model writes all.", ge=0
    )
    rollback: float | None = setting(
        5.0, help="As `threshold` of the acceptance rule `rollback`, in nats; 0: lossless; null: never.", ge=0
    )
    max_tokens: int = setting(10, help="Tokens of the small model in a row at most.", ge=1)

    swept: ClassVar[str] = "fallback"
    drafts: ClassVar[bool] = False
    values: ClassVar[Sequence[float]] = (0.3, 0.5, 0.6, 0.7, 0.9)

    @property
    def unit(self) -> Unit:
        """A token."""
        return Unit(1)


@cascades.register("bild", BildSettings)
class Bild:
    """A round of the lossless engine's loop: the small model's tokens until it falls back, then one call and a token of the large one."""

    def __init__(self, settings: BildSettings, pair: Pair) -> None:
        self._ledger = Ledger()
        self._engine = Engine(
            pair.target,
            ChainProposer(
                pair.small,
                listener=self._ledger.append,
                target_vocab_size=pair.target.vocab_size,
                num_tokens=pair.target.num_tokens,
            ),
            rule=Rollback(RollbackSettings(settings.rollback)),
            policy=Fallback(FallbackSettings(settings.fallback, settings.max_tokens)),
            sampling=pair.sampling,
            max_new_tokens=pair.max_new_tokens,
            seed=pair.seed,
            listener=self._ledger.append,
            stop_tokens=pair.stop_tokens,
        )

    @classmethod
    def create(cls, settings: BildSettings, pair: Pair) -> Decoder:
        """Return the decoder of these settings."""
        return cls(settings, pair)

    def generate(self, prompt: Prompt) -> CascadeGeneration:
        """Continue a prompt."""
        before, span = len(self._ledger.events), DeviceSpan(self._engine.lm.device)
        (found,) = self._engine.generate([prompt])
        seconds = span.end().seconds
        by_large = [one.num_emitted - one.num_accepted for one in found.rounds]
        return CascadeGeneration(
            id=prompt.id,
            tokens=found.tokens,
            num_by_large=sum(by_large),
            num_switches=_switches(found.rounds),
            num_taken_back=sum(one.num_draft_tokens - one.num_accepted for one in found.rounds),
            scores=[],
            forwards=self._ledger.events[before:],
            seconds=seconds,
        )


def _switches(rounds: Sequence[Round]) -> int:
    """Return how often the writer changes: each round has accepted tokens of the small model, then one of the large."""
    writers = [
        by_large
        for one in rounds
        for by_large in [False] * one.num_accepted + [True] * (one.num_emitted - one.num_accepted)
    ]
    return sum(one != other for one, other in itertools.pairwise(writers))
