"""One evaluation: drafters against a target, on prompts, at temperatures."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Exactness
from drafttrain.core.provenance import provenance
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.jacobi_exit import INSTEAD, NEEDS_ITERATES, JacobiExitSettings
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.acceptance.mixed_target import NEEDS_DRAWN_CHAINS, MixedTargetSettings
from drafttrain.eval.arms import Arm, Source, decode, faster_baseline
from drafttrain.eval.figures import compare, drafter_figures, plain_figures, prompt_counts, relative_speed
from drafttrain.eval.proposers import TrainingFree, is_warm
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.recalibrated import check_calibration
from drafttrain.eval.result import (
    FORMAT,
    AtTemperature,
    EvaluatedDrafter,
    EvaluatedTarget,
    PairedComparison,
    Provenance,
    Result,
)
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.spec_bench import write_answers
from drafttrain.eval.tuned import tuned_figures
from drafttrain.eval.typed_json import from_json
from drafttrain.eval.unfinished import Unfinished, made_with
from drafttrain.heads.folder import check_made_for
from drafttrain.target_model import Target


def evaluate(
    folders: Mapping[str, Path],
    target: Target,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    *,
    unfinished: Path | None = None,
    answers: Path | None = None,
) -> Result:
    """Evaluate drafter folders, which are read from disk here, and the training-free proposers of the settings.

    Args:
        folders: Drafters by name; the first one is judged. Each pair is compared, paired over prompts.
        unfinished: Folder in which outputs are stored until the end, so that an interrupted evaluation continues; None: they
            are not stored.
        answers: Folder for all outputs as Spec-Bench's answer files; None: they are not written.
    """
    prompts = list(prompts)[: settings.num_prompts]
    if settings.resamples is not None:
        say("note: eval.resamples has no effect: intervals are computed, not resampled. Remove it from the recipe.")
    _check_heads(folders, target, settings)
    drafters = {name: read_drafter(folder, target) for name, folder in folders.items()}
    choose_drafts(list(drafters.values()), settings)
    targets = {name: drafter.adapted(target) for name, drafter in drafters.items()}
    beside = _beside(drafters, settings)
    first = next(iter(targets.values()))
    sources = drafters | beside
    arms_targets = targets | {name: first if one.drafter else target for name, one in beside.items()}
    began = time.perf_counter()
    if any(map(is_warm, settings.beside)):
        unfinished = None  # what a proposer remembers is not stored, so the evaluation could not be continued
    stored = Unfinished(unfinished, made_with(folders, target, prompts, settings) if unfinished else {})
    temperatures = [
        _at_temperature(t, sources, arms_targets, target, prompts, settings, stored, answers)
        for t in settings.temperatures
    ]
    stored.remove()
    return Result(
        format=FORMAT,
        target=EvaluatedTarget(target.name, target.fingerprint, str(target.model.dtype).removeprefix("torch.")),
        drafters={name: _evaluated(folders[name], drafters[name], targets[name]) for name in folders},
        settings=settings.as_dict(),
        num_prompts=sum(1 + len(prompt.questions) for prompt in prompts),
        exactness=acceptance_rules.build(settings.rule).exactness.value,
        temperatures=temperatures,
        provenance=from_json(Provenance, provenance()),
        trainer_loaded=any(name in sys.modules for name in ("lightning", "deepspeed")),
        seconds=round(time.perf_counter() - began, 1),
    )


def choose_drafts(drafters: Sequence[Drafter], settings: EvalSettings) -> None:
    """Let drafters draft as the settings choose: with layers in parallel; strings, of those with their own tokenizer.

    Raises:
        CheckpointError: A drafter has no layers that can run in parallel, or none has its own tokenizer, and the settings need it.
    """
    chosen = [choose_draft(one, settings) for one in drafters]
    # Of several drafters, each that can draft strings.
    if chosen and not any(chosen):
        raise CheckpointError(
            "eval.across_tokenizers is strings, but no drafter here has its own tokenizer: set tokens"
        )


def choose_draft(drafter: Drafter, settings: EvalSettings) -> bool:
    """Let one drafter draft as the settings choose, and return whether it does.

    Strings need a tokenizer of the drafter's own: one without drafts the target's tokens.

    Raises:
        CheckpointError: It has no layers that can run in parallel, draws nothing, or drafts no iterates, and the settings need it.
    """
    if isinstance(settings.rule, MixedTargetSettings) and drafter.draft == "greedy":
        raise CheckpointError(
            f"eval.rule: {NEEDS_DRAWN_CHAINS}, and this drafter's draft: greedy draws none. Use rule: {{kind: lossless}}"
        )
    if isinstance(settings.rule, JacobiExitSettings) and drafter.kind != "consistency":
        raise CheckpointError(f"eval.rule: {NEEDS_ITERATES}, got a drafter of kind {drafter.kind}: {INSTEAD}")
    if settings.layer_parallel_size > 1:
        drafter.run_layers_parallel(settings.layer_parallel_size)
    return settings.across_tokenizers != "strings" or drafter.draft_strings()


def _check_heads(folders: Mapping[str, Path], target: Target, settings: EvalSettings) -> None:
    for part in (settings.rule, settings.length, *settings.also):
        if getattr(part, "head", None) is not None:
            for folder in folders.values():
                check_made_for(Path(part.head), target=target, drafter=folder)
        if getattr(part, "calibration", None) is not None:
            for folder in folders.values():
                check_calibration(Path(part.calibration).expanduser(), target=target, drafter=folder)


def _beside(drafters: Mapping[str, Drafter], settings: EvalSettings) -> dict[str, TrainingFree]:
    """Return the proposers of eval.beside by name; those that use a drafter get the first one."""
    judged = next(iter(drafters.values()))
    made = [TrainingFree(one, judged if getattr(one, "reads_drafter", False) else None) for one in settings.beside]
    beside = {one.label: one for one in made}
    if both := drafters.keys() & beside.keys():
        raise ValueError(f"eval.beside: {', '.join(sorted(both))} is also the name of a drafter: rename the drafter")
    return beside


def _at_temperature(
    temperature: float,
    sources: Mapping[str, Source],
    targets: Mapping[str, Target],
    original: Target,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    stored: Unfinished,
    answers: Path | None,
) -> AtTemperature:
    greedy = temperature == 0
    sampling = Sampling() if greedy else Sampling(temperature, settings.top_p, settings.top_k)
    # One plain arm for each target: an arm is compared with the plain decoding of its own, a tuned target with the original.
    plains = {
        id(one): Arm.create("plain", PLAIN, one, sampling, settings, length=settings.length)
        for one in (*targets.values(), original)
    }
    by_length = list(_arms_by_length(sources, targets, sampling, settings))
    arms = [arm for group in by_length for arm in group]
    plain = plains[id(arms[0].target)]
    generated = decode(
        [*plains.values(), *arms],
        prompts,
        settings,
        generate=settings.speed_prompts if greedy else 0,
        unfinished=stored,
    )
    if answers is not None:
        write_answers(answers, [plain, *arms])
    # transformers' generate decodes with the first drafter's target.
    baselines = {key: faster_baseline(one, generated if one is plain else []) for key, one in plains.items()}
    figures = {
        arm.name: drafter_figures(arm, baselines[id(arm.target)], plains[id(arm.target)], sampling, settings)
        for arm in arms
    }
    tuned = {
        name: tuned_figures(plains[id(targets[name])], plains[id(original)], settings)
        for name, source in sources.items()
        if isinstance(source, Drafter) and targets[name] is not original
    }
    comparisons = _comparisons(by_length, settings)
    return AtTemperature(temperature, plain_figures(plain, generated), figures, comparisons, tuned=tuned or None)


def _arms_by_length(
    sources: Mapping[str, Source], targets: Mapping[str, Target], sampling: Sampling, settings: EvalSettings
) -> Iterator[list[Arm]]:
    """Yield the arms of all sources at each draft length; for a lossy rule also the first drafter without loss."""
    lengths = [(settings.length, ""), *((one, f" ({length_label(one)})") for one in settings.also)]
    for length, suffix in lengths:
        yield [
            Arm.create(name + suffix, source, targets[name], sampling, settings, length=length)
            for name, source in sources.items()
        ]
    if acceptance_rules.build(settings.rule).exactness is Exactness.LOSSY:
        # A lossy figure is reported beside that of the lossless rule, on the same prompts at the same length.
        lossless = replace(settings, rule=LosslessSettings())
        name, source = next(iter(sources.items()))
        label = f"{name} (lossless)"
        yield [Arm.create(label, source, targets[name], sampling, lossless, length=settings.length)]


def _comparisons(by_length: Sequence[Sequence[Arm]], settings: EvalSettings) -> dict[str, PairedComparison]:
    """Compare each pair at the same length, then the first drafter with itself at further lengths."""
    judged, *at_other_lengths = [group[0] for group in by_length]
    pairs = [pair for group in by_length for pair in combinations(group, 2)]
    pairs += [(judged, other) for other in at_other_lengths]
    return {f"{first.name} - {other.name}": _comparison(first, other, settings) for first, other in pairs}


def _comparison(first: Arm, other: Arm, settings: EvalSettings) -> PairedComparison:
    difference = compare(prompt_counts(first, settings), prompt_counts(other, settings))
    return replace(difference, speed=relative_speed(first, other))


def _evaluated(folder: Path, drafter: Drafter, target: Target) -> EvaluatedDrafter:
    return EvaluatedDrafter(
        folder=folder.name,
        kind=drafter.kind,
        parameters=sum(p.numel() for p in drafter.parameters()),
        deepest=drafter.deepest,
        about=read_about(folder),
        target=target.name,
        target_modified=None if drafter.tuning is None else drafter.tuning.name,
    )
