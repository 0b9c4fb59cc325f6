"""The result of an evaluation: these dataclasses are eval.json, field by field; docs/eval_json.md describes every field.

A field whose default is None is left out of the file while it is None. A number that was not measured is nan here and null
in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import About
from drafttrain.core.calibration import Calibration
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import read_json
from drafttrain.eval.interval import Interval
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.older_results import completed
from drafttrain.eval.parity import Parity
from drafttrain.eval.pipelined import SERIAL
from drafttrain.eval.quality import Agreement, TaskScore, TunedFigures
from drafttrain.eval.typed_json import from_json, to_json
from drafttrain.heads.token_head import MadeFor

FORMAT = 5
"""Version of eval.json."""
LOSSY = "lossy"
AS_IN_ENGINES: Mapping[str, Any] = {"schedule": SERIAL, "layer_parallel_size": 1}
"""Settings of an evaluation whose rounds are those of serving engines. Evaluations of earlier versions have only such rounds."""


@dataclass(frozen=True)
class EvaluatedTarget:
    """The target that the drafters were evaluated with."""

    name: str
    fingerprint: str
    dtype: str
    """Type of its weights in memory."""


@dataclass(frozen=True)
class EvaluatedDrafter:
    """One drafter folder, read from disk."""

    folder: str
    kind: str
    parameters: int
    deepest: int | None
    """Draft tokens of a round at most; None: no limit."""
    about: About | None
    """Content of its drafttrain.json; None: it has none."""
    target: str
    """Name of the target that it was decoded with: another one where it was tuned."""
    target_modified: str | None = None
    """What of the folder the target was modified with: `adapter` or `target`; None: it is as it was."""


@dataclass(frozen=True)
class SamePrompts:
    """Both baselines on the prompts that transformers' generate decoded too."""

    num_prompts: int
    plain_tokens_per_second: float
    transformers_generate_tokens_per_second: float
    transformers_generate_equal: int
    transformers_generate_comparable: bool


@dataclass(frozen=True)
class PlainFigures:
    """Plain decoding of the target, without a drafter."""

    num_tokens: int
    target_calls: int
    tokens_per_second: float
    same_prompts: SamePrompts | None = None
    """None: transformers' generate was not measured."""
    round: RoundTimes | None = None


@dataclass(frozen=True, kw_only=True)
class Speedup(Interval):
    """Tokens per second of a drafter over those of its baseline; `num_prompts` counts the prompts of both."""

    baseline: str


@dataclass(frozen=True)
class Seconds:
    """Time by phase, summed over prompts."""

    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    seconds: float


@dataclass(frozen=True)
class RoundTimes:
    """Where the time of a mean round goes; prefill excluded."""

    target_ms: float
    """Forwards of the target."""
    drafter_ms: float
    """Forwards of the drafter; 0 without one."""
    drafting_ms: float
    """The rest of drafting: choosing draft tokens, the drafter's cache, Python."""
    verifying_ms: float
    """The rest of verification: probabilities, the acceptance rule, the target's cache, Python."""

    @property
    def total_ms(self) -> float:
        """The whole round."""
        return self.target_ms + self.drafter_ms + self.drafting_ms + self.verifying_ms


@dataclass(frozen=True)
class VllmFigures:
    """The same counts under the names of vLLM's metrics, over whole outputs."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_rate_per_position: Sequence[float]


@dataclass(frozen=True)
class Piece:
    """One token of a sample as text."""

    text: str
    drafted: bool
    """An accepted draft token; else one that the target chose."""


@dataclass(frozen=True)
class Sample:
    """One output, token by token."""

    id: str
    prompt: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class MacroFigures:
    """Means over prompts of each prompt's own figure: a short output weighs as much as a long one."""

    block_efficiency: Interval
    speedup: Interval
    """Mean tokens per second over those of the baseline, as Spec-Bench divides them."""


@dataclass(frozen=True)
class DrafterFigures:
    """All figures of one drafter, or training-free proposer, at one temperature and one draft length."""

    length: Mapping[str, Any]
    block_efficiency: Interval
    draft_acceptance_rate: float
    acceptance_by_position: Sequence[float]
    conditional_acceptance: Sequence[float]
    acceptance_histogram: Mapping[str, int]
    mbsu: float
    target_calls: int
    drafter_calls: int
    target_calls_per_token: float
    discarded_draft_tokens_per_token: float
    tokens_per_second: Interval
    speedup: Speedup
    seconds: Seconds
    vllm: VllmFigures
    slices: Mapping[str, Mapping[str, Interval]]
    """Block efficiency by axis (domain, language, turn, context) and slice; without axes on which all prompts are alike."""
    prompts: Sequence[PromptCounts]
    samples: Sequence[Sample]
    replay: Mapping[str, Interval]
    exactness: str
    macro: MacroFigures | None = None
    """None: an earlier version."""
    alpha: Interval | None = None
    """None: a training-free proposer, which has no distribution."""
    proposer: Mapping[str, Any] | None = None
    """Kind and settings of a training-free proposer; None: a drafter."""
    draft_vocabulary_share: float | None = None
    alpha_bound: float | None = None
    """The target's probability of all tokens of the drafter's vocabulary: alpha is at most that. None: it has the target's."""
    task: TaskScore | None = None
    agreement: Agreement | None = None
    parity: Parity | None = None
    round: RoundTimes | None = None
    two_devices: float | None = None
    """Forwards of plain decoding over those of this drafter, if the drafter had a device of its own; None: the schedule is serial."""

    @property
    def lossy(self) -> bool:
        """Whether the acceptance rule changes the distribution of the output."""
        return self.exactness == LOSSY


@dataclass(frozen=True)
class ComparedSlice:
    """Two drafters on the prompts of a slice, first less second."""

    block_efficiency: Interval
    permutation_p_value: float
    holm_p_value: float
    """The permutation p-value, corrected for all slices of the axis."""


@dataclass(frozen=True)
class PairedComparison:
    """Two drafters on the same prompts, first less second."""

    block_efficiency: Interval
    p_value: float
    """Of the interval (jackknife); two-sided."""
    speed: Interval | None = None
    """Tokens per second of the first over those of the second; None: not decoded in turns."""
    permutation_p_value: float | None = None
    """None, as those below: an earlier version."""
    macro: Interval | None = None
    """Difference of the means over prompts."""
    slices: Mapping[str, Mapping[str, ComparedSlice]] | None = None
    """By axis and slice."""


@dataclass(frozen=True)
class AtTemperature:
    """Everything that was measured at one temperature."""

    temperature: float
    plain: PlainFigures
    drafters: Mapping[str, DrafterFigures]
    comparisons: Mapping[str, PairedComparison]
    tuned: Mapping[str, TunedFigures] | None = None
    """By drafter, what tuning its target costs; None: all decoded with the original."""


@dataclass(frozen=True)
class Machine:
    """The machine that evaluated."""

    system: str
    processor: str
    cpus: int | None


@dataclass(frozen=True)
class Provenance:
    """Command, versions, machine and date of the evaluation."""

    command: Sequence[str]
    date: str
    commit: str
    python: str
    packages: Mapping[str, str]
    machine: Machine


@dataclass(frozen=True)
class HeadFigures:
    """Predictions of an exported head on held-out draft tokens."""

    kind: str
    made_for: MadeFor | None
    parameters: int
    settings: Mapping[str, Any]
    rows: int
    held_out: Mapping[str, Calibration]
    """`untrained` and `trained`, and others by name."""


@dataclass(frozen=True)
class Input:
    """A path of the recipe whose content was read."""

    path: str
    digest: Any
    """Digest of the content, a list where it consists of several files; None: not known."""


@dataclass(frozen=True)
class Result:
    """What `evaluate` returns, and eval.json holds."""

    format: int
    target: EvaluatedTarget
    drafters: Mapping[str, EvaluatedDrafter]
    settings: Mapping[str, Any]
    """The section `eval` of the recipe as it was used."""
    num_prompts: int
    exactness: str
    """Of the configured acceptance rule: `distribution` or `lossy`."""
    temperatures: Sequence[AtTemperature]
    provenance: Provenance
    trainer_loaded: bool
    seconds: float
    prompts_dropped_for_overlap: int | None = None
    head: HeadFigures | None = None
    inputs: Mapping[str, Input] | None = None

    @property
    def lossy(self) -> bool:
        """Whether the configured acceptance rule changes the distribution of the output."""
        return self.exactness == LOSSY

    @property
    def changed_rounds(self) -> dict[str, Any]:
        """The settings with which a round yields other tokens than in serving engines; empty: none."""
        return {key: value for key, usual in AS_IN_ENGINES.items() if (value := self.settings.get(key, usual)) != usual}

    @property
    def greedy_or_first(self) -> AtTemperature:
        """Return temperature 0 where it was evaluated, else the first temperature."""
        return next((part for part in self.temperatures if part.temperature == 0), self.temperatures[0])

    def json(self) -> dict[str, Any]:
        """Return the content of eval.json."""
        content: dict[str, Any] = to_json(self)
        return content

    def write(self, path: Path) -> None:
        """Write eval.json."""
        write_json(path, self.json())


def read_result(path: Path) -> Result:
    """Read an eval.json.

    Raises:
        CheckpointError: It is missing, or not the result of an evaluation.
    """
    content = read_json(path)
    try:
        return from_json(Result, completed({"format": FORMAT} | content))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: not an evaluation ({why}). Run drafttrain eval again.") from error


def current_result(path: Path) -> Result | None:
    """Return the evaluation of a file; None where there is no file, or one in an older format: evaluate again."""
    if not path.exists() or read_json(path).get("format") != FORMAT:
        return None
    return read_result(path)
