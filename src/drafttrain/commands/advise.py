"""drafttrain advise: which draft length pays on which GPU, by measured acceptance and the clock of the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of, length_of
from drafttrain.config.load import load_sections
from drafttrain.core.console import say, table
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.gpus import MEMORY_AND_BANDWIDTH, Gpu, gpu_named
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval import advised
from drafttrain.eval.advice import ASSUMED, Advice, Candidate, Device, End, MeasuredSpeedup, Recorded
from drafttrain.eval.clock import DATA_SHEET, Efficiency, roofline_of
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.evaluate import choose_draft
from drafttrain.eval.fastest_length import evaluated_lengths, times_hold_for
from drafttrain.eval.interval import Interval
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.lone_rounds import calibrated, lone_rounds
from drafttrain.eval.page import write_picture
from drafttrain.eval.pipelined import PIPELINED
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.report import write_report
from drafttrain.eval.result import Result, read_result
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.typed_json import to_json
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.judging import commands_of
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target

HERE = "here"
NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
FRESH = {"num_prompts": 12, "max_new_tokens": 64, "speed_prompts": 0}
"""A small evaluation, where there is none yet."""
AS_EVALUATED = ("schedule", "across_tokenizers", "layer_parallel_size")
"""Settings that decide what a round drafts: those of the evaluation count, because its acceptance does."""


@dataclass(frozen=True)
class Question:
    """What the command line asks."""

    drafter: str
    target: str | None
    gpus: Sequence[str]
    batches: Sequence[int]
    contexts: Sequence[int]
    dtype: str
    overrides: Sequence[str]
    bandwidth_share: float = Efficiency.bandwidth
    peak_share: float = Efficiency.flops
    launch_us: float = 1e6 * Efficiency.layer_seconds

    @property
    def efficiency(self) -> Efficiency:
        """What is assumed to be reached of a data sheet."""
        return Efficiency(self.bandwidth_share, self.peak_share, self.launch_us / 1e6)

    def check(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            RecipeError: With every problem.
        """
        problems = [
            f"--gpu: unknown GPU {name!r}. Available: {', '.join(MEMORY_AND_BANDWIDTH)}, {HERE}"
            for name in self.gpus
            if name != HERE and gpu_named(name) is None
        ]
        shares = {"--bandwidth-share": self.bandwidth_share, "--peak-share": self.peak_share}
        problems += [
            f"{option}: must be above 0 and at most 1, got {share:g}"
            for option, share in shares.items()
            if not 0 < share <= 1
        ]
        if self.launch_us < 0:
            problems.append(f"--launch-us: must be 0 or more, got {self.launch_us:g}")
        if self.dtype not in NUM_BYTES:
            problems.append(f"--dtype: must be one of {', '.join(NUM_BYTES)}, got {self.dtype!r}")
        if problems:
            raise RecipeError("arguments", problems)


@dataclass(frozen=True)
class _Opened:
    drafter: Drafter
    target: Target
    settings: EvalSettings
    prompt: Prompt
    folder: Path
    result: Result


def advise(question: Question, *, out: Path | None = None) -> Advice:
    """Print what to expect of a drafter, and write advice.json, advice.png and report.html.

    Args:
        out: Their folder; None: that of a local drafter, else nothing is written.
    """
    question.check()
    quiet_libraries()
    opened = _opened(question)
    recorded = _recorded(opened)
    devices = [device for name in question.gpus for device in _devices(name, question, opened)]
    surface = recorded.surface(devices, batches=question.batches, contexts=question.contexts)
    ends = [
        End(device.name, context, recorded.end_of_gain(device, context=context))
        for device in devices
        for context in question.contexts
    ]
    result = opened.result
    advice = Advice(
        drafter=question.drafter,
        target=opened.target.name,
        temperature=_temperature(opened),
        num_prompts=result.num_prompts,
        surface=surface,
        ends=ends,
        measured=[
            f"acceptance: {result.num_prompts} prompts, {result.provenance.date}, {result.provenance.machine.processor}",
            f"forwards of each length: {len(recorded.candidates[0].rounds)} rounds on this machine",
            *(device.how for device in devices if device.name == HERE),
        ],
        assumed=[*(device.how for device in devices if device.name != HERE), *ASSUMED],
        speeds=_measured(opened) if HERE in question.gpus else [],
        evaluated=result.provenance.date,
    )
    _show(advice)
    out = out or (Path(question.drafter) if Path(question.drafter).is_dir() else None)
    if out is None:
        say("advice.json, advice.png and report.html: not written: give --out DIR")
    else:
        _write(advice, out, opened, title=Path(question.drafter).name)
    return advice


def _opened(question: Question) -> _Opened:
    folder = folders_of([question.drafter])[0]
    of_target, settings = load_sections(["target", "eval"], question.overrides)
    of_target = evaluated_on(
        of_target, folder, named=question.drafter, target=question.target, overrides=question.overrides
    )
    check_drafters(of_target, [str(folder)])
    loaded = Target.load(of_target)
    result = _evaluation(folder, loaded)
    if result is None:
        say("no evaluation of this drafter with this target is there: a small one is made first")
        limits = {name: min(most, getattr(settings, name) or most) for name, most in FRESH.items()}
        settings = replace(settings, **limits)
        result = evaluate_folders({"drafter": folder}, loaded, settings, dropped=())
    usual = EvalSettings()
    settings = replace(settings, **{name: result.settings.get(name, getattr(usual, name)) for name in AS_EVALUATED})
    drafter = read_drafter(folder, loaded)
    choose_draft(drafter, settings)
    prompts = read_prompts(settings.prompts, loaded.tokenizer, prompt_tokens=settings.prompt_tokens, limit=1)
    return _Opened(drafter, drafter.adapted(loaded), settings, prompts[0], folder, result)


def _evaluation(folder: Path, target: Target) -> Result | None:
    """Return the evaluation beside a drafter, or of its run, with this target."""
    for path in (folder / "eval.json", folder.parent / "eval.json"):
        result = read_result(path) if path.exists() else None
        if result is not None and result.target.fingerprint == target.fingerprint:
            say(f"acceptance: {path}")
            return result
    return None


def _temperature(opened: _Opened) -> float:
    wanted = opened.settings.temperatures[0]
    return min((part.temperature for part in opened.result.temperatures), key=lambda one: abs(one - wanted))


def _candidates(opened: _Opened) -> list[Candidate]:
    """Return every length that was evaluated, and the chains that replay computed."""
    arms = evaluated_lengths(opened.result, _temperature(opened), opened.folder)
    if not arms:
        raise CheckpointError(f"{opened.folder}: its evaluation has no lossless figures. Run drafttrain eval again")
    known: list[tuple[Mapping[str, Any], Interval, bool]] = [(one.length, one.block_efficiency, False) for one in arms]
    evaluated = [length for length, *_ in known]
    # Replay is about rounds that follow each other.
    for count, value in ({} if _pipelined(opened) else arms[0].replay).items():
        length = component_mapping(FixedLengthSettings(num_draft_tokens=int(count)))
        if length not in evaluated:
            known.append((length, value, True))
    return [_candidate(opened, *one) for one in known]


def _measured(opened: _Opened) -> list[MeasuredSpeedup]:
    """Return the speed-ups of the evaluation, if this machine made it."""
    result = opened.result
    if not times_hold_for(opened.target, dtype=result.target.dtype, processor=result.provenance.machine.processor):
        return []
    return [
        MeasuredSpeedup(HERE, result.settings["batch_size"], one.length, one.speedup)
        for one in evaluated_lengths(result, _temperature(opened), opened.folder)
    ]


def _candidate(opened: _Opened, length: Mapping[str, Any], value: Interval, from_replay: bool) -> Candidate:
    rounds = lone_rounds(opened.drafter, opened.target, opened.prompt, _settings(opened), length=length_of(length))
    return Candidate(length, value, from_replay, rounds, pipelined=_pipelined(opened))


def _pipelined(opened: _Opened) -> bool:
    return opened.settings.schedule == PIPELINED


def _recorded(opened: _Opened) -> Recorded:
    settings, candidates = _settings(opened), _candidates(opened)
    (plain,) = lone_rounds(PLAIN, opened.target, opened.prompt, settings, length=settings.length, count=1)
    sampling = Sampling(_temperature(opened))
    memory = DecodingMemory.of(opened.target, opened.drafter, sampling, candidates[0].rounds[-1].forwards)
    return Recorded(candidates, plain.forwards[-1], memory)


def _settings(opened: _Opened) -> EvalSettings:
    return replace(opened.settings, temperatures=[_temperature(opened)])


def _devices(name: str, question: Question, opened: _Opened) -> list[Device]:
    """Return this machine, or a GPU twice: by its data sheet, and at what is assumed to be reached of it."""
    if name == HERE:
        here = calibrated(opened.drafter, opened.target, opened.prompt, _settings(opened))
        how = f"{HERE}: the target by lone forwards of 1, 8 and 64 tokens, the drafter and Python by lone rounds of 3 and 6"
        return [Device(HERE, here.clock, how, host=here.host, plain_host=here.plain_host)]
    gpu = gpu_named(name)
    assert gpu is not None, "checked before"
    width = NUM_BYTES[question.dtype] / opened.target.model.dtype.itemsize
    return [
        Device(
            gpu.name,
            roofline_of(gpu, question.efficiency),
            _reached(gpu, question),
            width=width,
            memory_bytes=gpu.memory_bytes,
        ),
        Device(
            f"{gpu.name}, ideal",
            roofline_of(gpu, DATA_SHEET),
            f"{gpu.name}, ideal: {_rate(gpu)} of its data sheet, {question.dtype}, nothing else takes time",
            width=width,
            memory_bytes=gpu.memory_bytes,
        ),
    ]


def _reached(gpu: Gpu, question: Question) -> str:
    reached = question.efficiency
    return (
        f"{gpu.name}: {reached.bandwidth:.0%} of its bandwidth, {reached.flops:.0%} of its peak ({_rate(gpu)}, data sheet), "
        f"{1e6 * reached.layer_seconds:g} us for each layer of a call, {question.dtype}, no time of the host"
    )


def _rate(gpu: Gpu) -> str:
    return f"{gpu.bandwidth / 1e9:,.0f} GB/s and {gpu.peak_flops / 1e12:,.0f} TFLOP/s"


def _show(advice: Advice) -> None:
    table(advised.best_rows(advice), columns=advised.BEST_COLUMNS, title=f"\n{advised.heading(advice)}")
    table(advised.end_rows(advice), columns=advised.END_COLUMNS)
    for heading, lines in (("measured", advice.measured), ("assumed", advice.assumed)):
        say(f"{heading}:")
        for line in lines:
            say(f"  {line}")


def _write(advice: Advice, out: Path, opened: _Opened, *, title: str) -> None:
    """Write advice.json and advice.png; and report.html, unless it is that of another evaluation."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("advice.json", "advice.png", "report.html")]
    content, drawing, report = files
    write_json(content, to_json(advice))
    write_picture(drawing, lambda axes: advised.draw(axes, advice), height=advised.HEIGHT, **advised.grid(advice))
    beside = out / "eval.json"
    if beside.exists() and read_result(beside).provenance.date != advice.evaluated:
        files.remove(report)
    else:
        write_report(out, opened.result, title=title, command=commands_of(out))
    say(f"written: {', '.join(map(str, files))}")
