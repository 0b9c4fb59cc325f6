"""Compares the exported candidate with the current drafter on held-out requests. A gain must be statistically significant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance.lossless import Lossless, LosslessSettings
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.replay import expected_rounds, replay_rows
from drafttrain.eval.statistics import ratio_difference
from drafttrain.online.positions import text_of
from drafttrain.target_model import Target

PARITY_TOKENS = 32


def request_counts(
    target: Target, drafter: Drafter, records: Sequence[Record], sampling: Sampling, *, num_draft_tokens: int
) -> list[tuple[float, float]]:
    """Return (tokens, expected rounds) of each request, by replay. The ratio of their sums is the block efficiency."""
    texts = [text_of(record) for record in records]
    rows = replay_rows(target, drafter, texts, sampling, num_depths=num_draft_tokens)
    return [
        (float(len(text.new)), expected_rounds(row, num_draft_tokens)) for text, row in zip(texts, rows, strict=True)
    ]


@dataclass(frozen=True)
class Judgement:
    """Whether a candidate is published, and why."""

    promoted: bool
    reason: str
    block_efficiency: float
    """Block efficiency of the candidate."""
    current: float
    """Block efficiency of the current drafter on the same requests."""
    difference: dict[str, float]
    """Difference with its 95 % interval, paired over requests."""
    p_value: float
    parity: str
    num_requests: int

    def json(self) -> dict[str, Any]:
        """Return the values for the history."""
        return asdict(self)


def judge(
    candidate: Path,
    current: Path,
    target: Target,
    records: Sequence[Record],
    *,
    sampling: Sampling,
    num_draft_tokens: int,
    significance: float,
    parity_prompts: int,
) -> tuple[Judgement, list[tuple[float, float]]]:
    """Compare two drafter folders. Return the judgement, and the counts of the candidate by request."""
    folders = (candidate, current)
    drafters = [read_drafter(folder, target) for folder in folders]
    ours, theirs = (
        request_counts(target, one, records, sampling, num_draft_tokens=num_draft_tokens) for one in drafters
    )
    parts = [tuple(zip(*counts, strict=True)) for counts in (ours, theirs)]
    gain = ratio_difference(*parts)  # type: ignore[arg-type]
    parity_report, lossless = "", True
    if not gain.value > 0:
        reason = "not better than the current version"
    elif not gain.p_value < significance:
        reason = "the gain is not significant"
    else:
        parity_report, lossless = greedy_parity(
            drafters[0], target, records[-parity_prompts:], num_draft_tokens=num_draft_tokens
        )
        reason = "better" if lossless else "the exported files do not decode the same text as the target alone"
    efficiency, before = (sum(part[0]) / sum(part[1]) for part in parts)
    promoted = reason == "better"
    judgement = Judgement(promoted, reason, efficiency, before, gain.json(), gain.p_value, parity_report, len(records))
    return judgement, ours


def greedy_parity(
    drafter: Drafter, target: Target, records: Sequence[Record], *, num_draft_tokens: int
) -> tuple[str, bool]:
    """Decode prompts with and without a drafter. Return the parity report, and whether all outputs are equal except near ties."""
    prompts = []
    for number, record in enumerate(records):
        text = text_of(record)
        prompts.append(Prompt(f"{number}:{text.id}", text.prompt))
    outputs = []
    for proposer in (NoDraft(), drafter.proposer(target)):
        engine = Engine(
            target,
            proposer,
            rule=Lossless(LosslessSettings()),
            policy=FixedLength(FixedLengthSettings(num_draft_tokens=num_draft_tokens)),
            sampling=Sampling(),
            max_new_tokens=PARITY_TOKENS,
        )
        outputs.append([engine.generate([prompt])[0] for prompt in prompts])
    found = parity(outputs[0], outputs[1], target)
    return str(found), found.lossless
