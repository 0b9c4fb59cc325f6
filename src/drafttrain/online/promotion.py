"""Candidate against current on held-out requests of the same stream, by their files; better is only what is better for sure."""

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
    """Return (tokens, expected rounds) of each request, by replay: their sums' ratio is the block efficiency."""
    texts = [text_of(record) for record in records]
    rows = replay_rows(target, drafter, texts, sampling, num_depths=num_draft_tokens)
    return [
        (float(len(text.new)), expected_rounds(row, num_draft_tokens)) for text, row in zip(texts, rows, strict=True)
    ]


@dataclass(frozen=True)
class Judgement:
    """Whether a candidate is to be published, and why."""

    promoted: bool
    reason: str
    block_efficiency: float
    """The candidate's."""
    current: float
    """The current drafter's on the same requests."""
    difference: dict[str, float]
    """With its 95 % interval, paired over requests."""
    p_value: float
    parity: str
    num_requests: int

    def json(self) -> dict[str, Any]:
        """Return what the history holds."""
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
    """Compare two drafter folders; return the judgement, and the candidate's counts by request."""
    folders = (candidate, current)
    drafters = [read_drafter(folder, target) for folder in folders]
    ours, theirs = (
        request_counts(target, one, records, sampling, num_draft_tokens=num_draft_tokens) for one in drafters
    )
    parts = [tuple(zip(*counts, strict=True)) for counts in (ours, theirs)]
    gain = ratio_difference(*parts)  # type: ignore[arg-type]
    said, lossless = "", True
    reason = ""
    if not gain.value > 0:
        reason = "it is no better than the current one"
    elif not gain.p_value < significance:
        reason = "the gain could be chance"
    else:
        said, lossless = greedy_parity(
            drafters[0], target, records[-parity_prompts:], num_draft_tokens=num_draft_tokens
        )
        reason = "better" if lossless else "its files do not decode as the target alone does"
    efficiency, before = (sum(part[0]) / sum(part[1]) for part in parts)
    promoted = reason == "better"
    return Judgement(promoted, reason, efficiency, before, gain.json(), gain.p_value, said, len(records)), ours


def greedy_parity(
    drafter: Drafter, target: Target, records: Sequence[Record], *, num_draft_tokens: int
) -> tuple[str, bool]:
    """Decode prompts of requests with and without a drafter; return what parity says, and whether all is equal but near ties."""
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
    return str(found), all(one.near_tie for one in found.divergences)
