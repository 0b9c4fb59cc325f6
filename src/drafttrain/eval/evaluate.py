"""One evaluation: drafters against a target, on prompts, at temperatures; from rounds and forwards to eval.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.console import progress, say
from drafttrain.core.generations import Generation
from drafttrain.core.proposals import Exactness
from drafttrain.core.provenance import provenance
from drafttrain.core.roles import CostAware
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.checkers import checkers
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.engine import Engine
from drafttrain.eval.generate import generate as transformers_generate
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length import length_policies
from drafttrain.eval.metrics import PromptCounts, counts_of, histogram, mbsu, totals_of
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.quality import agreement, solved, task_score
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.statistics import ratio_difference, ratio_interval, ratio_of_ratios
from drafttrain.heads import check_made_for
from drafttrain.target_model import Target

FORMAT = 3
"""Version of eval.json; docs/eval_json.md describes it."""
CALIBRATION_PROMPTS = 2
"""Decoded once more, behind the one that warms up, for a length policy that weighs tokens against time."""


@dataclass
class Arm:
    """One way of decoding the same prompts: plain, or with one drafter."""

    name: str
    engine: Engine
    ledger: Ledger
    length: Any
    """Settings of its length policy."""
    target: Target
    """The one given, or a drafter's own: with the adapters that it was exported with."""
    drafter: Drafter | None = None
    generations: list[Generation] = field(default_factory=list)


def read_result(path: Path) -> dict[str, Any] | None:
    """Return what an eval.json holds; None: there is none, or one of another format, which is made anew."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("format") == FORMAT else None


def evaluate(
    folders: Mapping[str, Path], target: Target, prompts: Sequence[Prompt], settings: EvalSettings
) -> dict[str, Any]:
    """Return everything about drafter folders, read from disk here and now.

    Args:
        folders: Drafters by name; the first is the one that is judged, others are compared with it, paired.
    """
    prompts = list(prompts)[: settings.num_prompts]
    if settings.resamples is not None:
        say("note: eval.resamples has no effect: intervals are computed, not resampled. Remove it from the recipe.")
    for part in (settings.rule, settings.length, *settings.also):
        if getattr(part, "head", None) is not None:
            for folder in folders.values():
                check_made_for(Path(part.head), target=target, drafter=folder)
    drafters = {name: read_drafter(folder, target) for name, folder in folders.items()}
    targets = {name: drafter.adapted(target) for name, drafter in drafters.items()}
    began = time.perf_counter()
    result: dict[str, Any] = {
        "format": FORMAT,
        "target": {"name": target.name, "fingerprint": target.fingerprint},
        "drafters": {
            name: _about(folder, drafters[name]) | {"target": targets[name].name} for name, folder in folders.items()
        },
        "settings": asdict(settings)
        | {
            "rule": _component(settings.rule),
            "length": _component(settings.length),
            "also": [_component(length) for length in settings.also],
            "checker": _component(settings.checker) if settings.checker else None,
        },
        "num_prompts": len(prompts),
        "exactness": acceptance_rules.build(settings.rule).exactness.value,
        "temperatures": [_at_temperature(t, drafters, targets, prompts, settings) for t in settings.temperatures],
        "provenance": provenance(),
        "trainer_loaded": any(name in sys.modules for name in ("lightning", "deepspeed")),
    }
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def _at_temperature(
    temperature: float,
    drafters: Mapping[str, Drafter],
    targets: Mapping[str, Target],
    prompts: Sequence[Prompt],
    settings: EvalSettings,
) -> dict[str, Any]:
    greedy = temperature == 0
    sampling = Sampling() if greedy else Sampling(temperature, settings.top_p, settings.top_k)
    # One plain arm a target: each drafter is held against the plain decoding of its own.
    plains = {id(one): _arm("plain", None, one, sampling, settings, length=settings.length) for one in targets.values()}
    by_length = [
        [
            _arm(name + suffix, drafter, targets[name], sampling, settings, length=length)
            for name, drafter in drafters.items()
        ]
        for length, suffix in [(settings.length, ""), *((one, f" ({length_label(one)})") for one in settings.also)]
    ]
    if acceptance_rules.build(settings.rule).exactness is Exactness.LOSSY:
        # A lossy figure stands beside that of the lossless rule, on the same prompts at the same length.
        kept = replace(settings, rule=LosslessSettings())
        name, drafter = next(iter(drafters.items()))
        by_length.append([_arm(f"{name} (lossless)", drafter, targets[name], sampling, kept, length=settings.length)])
    arms = [arm for group in by_length for arm in group]
    plain = plains[id(arms[0].target)]
    generated = _decode([*plains.values(), *arms], prompts, settings, generate=settings.speed_prompts if greedy else 0)
    # transformers' generate decodes with the first drafter's target.
    baselines = {key: _baseline(one, generated if one is plain else []) for key, one in plains.items()}
    rates = [
        _figures(arm, baselines[id(arm.target)], plains[id(arm.target)], prompts, sampling, settings) for arm in arms
    ]
    found: dict[str, Any] = {
        "temperature": temperature,
        "plain": _plain_figures(plain, generated),
        "drafters": {arm.name: figures for arm, figures in zip(arms, rates, strict=True)},
    }
    found["comparisons"] = {
        f"{first.name} - {other.name}": compare(_counts(first, settings), _counts(other, settings))
        for first, *others in by_length
        for other in others
    }
    judged, *at_other_lengths = [group[0] for group in by_length]
    found["comparisons"] |= {
        f"{judged.name} - {other.name}": compare(_counts(judged, settings), _counts(other, settings))
        | {"speed": _speed(judged, other)}
        for other in at_other_lengths
    }
    return found


def _speed(arm: Arm, other: Arm) -> dict[str, float]:
    """Return how many times as many tokens a second an arm makes as another, on the same prompts, in turns."""
    parts = [([len(g.tokens) for g in a.generations], [g.seconds for g in a.generations]) for a in (arm, other)]
    return ratio_of_ratios(*parts).json()


def compare(first: Sequence[PromptCounts], second: Sequence[PromptCounts]) -> dict[str, Any]:
    """Return the difference in block efficiency of two drafters on the same prompts, first less second."""
    assert [c.id for c in first] == [c.id for c in second]
    parts = [([c.num_tokens for c in counts], [c.num_rounds for c in counts]) for counts in (first, second)]
    found = ratio_difference(*parts)
    return {"block_efficiency": found.json(), "p_value": found.p_value}


def _arm(
    name: str, drafter: Drafter | None, target: Target, sampling: Sampling, settings: EvalSettings, *, length: Any
) -> Arm:
    ledger = Ledger()
    proposer = NoDraft() if drafter is None else drafter.proposer(target, ledger.append)
    engine = Engine(
        target,
        proposer,
        rule=acceptance_rules.build(settings.rule),
        policy=length_policies.build(length),
        sampling=sampling,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        listener=ledger.append,
    )
    return Arm(name, engine, ledger, length, target, drafter)


def _decode(
    arms: Sequence[Arm], prompts: Sequence[Prompt], settings: EvalSettings, *, generate: int
) -> list[Generation]:
    """Decode every prompt with every arm, in turns whose order alternates; return what transformers' generate makes of the first.

    Args:
        generate: On so many prompts, if they are decoded one at a time.
    """
    by_generate = prompts[:generate] if settings.batch_size == 1 else []
    for arm in arms:
        arm.engine.generate(prompts[:1])
        if isinstance(arm.engine.policy, CostAware):
            arm.engine.policy.calibrate(arm.engine.generate(prompts[:CALIBRATION_PROMPTS]))
        arm.ledger.events.clear()
    for prompt in by_generate[:1]:
        transformers_generate(prompt, arms[0].target, max_new_tokens=settings.max_new_tokens)
    generated: list[Generation] = []
    groups = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]
    temperature = arms[0].engine.sampling.temperature
    with progress(f"decoding at temperature {temperature:g}", total=len(prompts), unit="prompts") as bar:
        for number, group in enumerate(groups):
            for arm in arms if number % 2 == 0 else reversed(arms):
                arm.generations += arm.engine.generate(group)
            for prompt in by_generate[number : number + 1]:
                generated.append(transformers_generate(prompt, arms[0].target, max_new_tokens=settings.max_new_tokens))
            bar.advance(len(group))
    return generated


def _counts(arm: Arm, settings: EvalSettings) -> list[PromptCounts]:
    return [counts_of(one, repetition_ngram=settings.repetition_ngram) for one in arm.generations]


@dataclass(frozen=True)
class Baseline:
    """The target alone, decoded in turns with the drafters: tokens and seconds of the first prompts."""

    name: str
    tokens: Sequence[int]
    seconds: Sequence[float]


def _baseline(plain: Arm, generated: Sequence[Generation]) -> Baseline:
    """Return the faster of plain decoding and, where it writes the same text, transformers' generate on the same prompts."""
    if (
        generated
        and _same_text(plain, generated)
        and _tokens_per_second(generated) > _tokens_per_second(plain.generations[: len(generated)])
    ):
        name, found = "transformers' generate", generated
    else:
        name, found = "plain decoding, same engine", plain.generations
    return Baseline(name, [len(g.tokens) for g in found], [g.seconds for g in found])


def _same_text(plain: Arm, generated: Sequence[Generation]) -> bool:
    """Return whether transformers' generate writes what plain decoding writes, near ties apart."""
    found = parity(plain.generations[: len(generated)], generated, plain.target)
    return all(one.near_tie for one in found.divergences)


def _tokens_per_second(generations: Sequence[Generation]) -> float:
    return sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations)


def _figures(
    arm: Arm, baseline: Baseline, plain: Arm, prompts: Sequence[Prompt], sampling: Sampling, settings: EvalSettings
) -> dict[str, Any]:
    """Return all figures of one drafter at one temperature."""
    assert arm.drafter is not None
    counts = _counts(arm, settings)
    totals, whole = totals_of(counts), totals_of([counts_of(one) for one in arm.generations])
    rounds = [c.num_rounds for c in counts]
    ledger = arm.ledger
    target_calls = ledger.calls("target")
    tokens, seconds = [len(g.tokens) for g in arm.generations], [g.seconds for g in arm.generations]
    same = len(baseline.tokens)
    figures: dict[str, Any] = {
        "length": _component(arm.length),
        "block_efficiency": ratio_interval([c.num_tokens for c in counts], rounds).json(),
        "draft_acceptance_rate": totals.draft_acceptance_rate,
        "acceptance_by_position": totals.acceptance_by_position,
        "conditional_acceptance": totals.conditional_acceptance,
        "acceptance_histogram": histogram(arm.generations),
        "mbsu": mbsu(
            num_tokens=whole.num_tokens,
            num_rounds=whole.num_rounds,
            plain_bytes=ledger.plain_bytes(),
            bytes_read=ledger.bytes_read(),
        ),
        "target_calls": target_calls,
        "drafter_calls": ledger.calls("drafter"),
        "target_calls_per_token": whole.num_rounds / whole.num_tokens,
        "discarded_draft_tokens_per_token": (whole.num_draft_tokens - whole.num_accepted) / whole.num_tokens,
        "tokens_per_second": ratio_interval(tokens, seconds).json(),
        "speedup": ratio_of_ratios((tokens[:same], seconds[:same]), (baseline.tokens, baseline.seconds)).json()
        | {"baseline": baseline.name, "num_prompts": same},
        "seconds": {
            name: sum(getattr(g, name) for g in arm.generations)
            for name in ("prefill_seconds", "draft_seconds", "verify_seconds", "seconds")
        },
        "vllm": {
            "num_drafts": whole.num_rounds,
            "num_draft_tokens": whole.num_draft_tokens,
            "num_accepted_tokens": whole.num_accepted,
            "mean_acceptance_length": 1 + whole.num_accepted / whole.num_rounds,
            "draft_acceptance_rate": whole.draft_acceptance_rate,
            "acceptance_rate_per_position": whole.acceptance_by_position,
        },
        "domains": _domains(counts),
        "prompts": [asdict(c) for c in counts],
        "samples": [_sample(one, arm.target) for one in arm.generations[:4]],
    }
    figures |= _replayed(arm, sampling, settings)
    lossy = arm.engine.rule.exactness is Exactness.LOSSY
    figures["exactness"] = arm.engine.rule.exactness.value
    if settings.checker is not None:
        checker = checkers.build(settings.checker)
        scores = [solved(checker, arm.target.tokenizer, prompts, one.generations) for one in (arm, plain)]
        figures["task"] = task_score(scores[0], scores[1])
    if sampling.temperature == 0 and lossy:
        figures["agreement"] = agreement(plain.generations, arm.generations)
    if sampling.temperature == 0 and not lossy:
        found = parity(plain.generations, arm.generations, arm.target)
        figures["parity"] = found.json() | {"text": str(found)}
    return figures


def _replayed(arm: Arm, sampling: Sampling, settings: EvalSettings) -> dict[str, Any]:
    """Return acceptance rate and block efficiency by draft length, by replay on the text that the loop emitted."""
    assert arm.drafter is not None
    counted = _counts(arm, settings)
    texts = [
        Text(one.id, list(one.prompt_tokens), list(one.tokens[: count.num_tokens]))
        for one, count in zip(arm.generations, counted, strict=True)
    ]
    rows = replay_rows(arm.target, arm.drafter, texts, sampling, num_depths=max(settings.replay_lengths, default=0))
    tokens = [len(text.new) for text in texts]
    alpha = ratio_interval([r.acceptance_T.sum() for r in rows], tokens).json()
    if arm.engine.rule.exactness is Exactness.LOSSY:
        # A lossy rule's text is not of the target's law, which replay takes it to be.
        return {"alpha": alpha, "replay": {}}
    return {
        "alpha": alpha,
        "replay": {
            str(k): ratio_interval(tokens, [expected_rounds(r, k) for r in rows]).json()
            for k in settings.replay_lengths
        },
    }


def _plain_figures(plain: Arm, generated: Sequence[Generation]) -> dict[str, Any]:
    generations = plain.generations
    found: dict[str, Any] = {
        "num_tokens": sum(len(g.tokens) for g in generations),
        "target_calls": plain.ledger.calls("target"),
        "tokens_per_second": _tokens_per_second(generations),
    }
    if generated:
        found["same_prompts"] = {
            "num_prompts": len(generated),
            "plain_tokens_per_second": _tokens_per_second(generations[: len(generated)]),
            "transformers_generate_tokens_per_second": _tokens_per_second(generated),
            "transformers_generate_equal": sum(
                list(own.tokens) == list(other.tokens)
                for own, other in zip(generations[: len(generated)], generated, strict=True)
            ),
            "transformers_generate_comparable": _same_text(plain, generated),
        }
    return found


def _domains(counts: Sequence[PromptCounts]) -> dict[str, float]:
    names = sorted({c.domain for c in counts})
    if len(names) < 2:
        return {}
    return {name: totals_of([c for c in counts if c.domain == name]).block_efficiency for name in names}


def _sample(one: Generation, target: Target) -> dict[str, Any]:
    """Return an output in pieces, each with who chose it: an accepted draft token or the target."""
    pieces = []
    for part in one.rounds:
        emitted = one.tokens[part.start : part.start + part.num_emitted]
        for place, token in enumerate(emitted):
            pieces.append({"text": target.tokenizer.decode([token]), "drafted": place < part.num_accepted})
    return {"id": one.id, "prompt": target.tokenizer.decode(list(one.prompt_tokens)), "pieces": pieces}


def _about(folder: Path, drafter: Drafter) -> dict[str, Any]:
    about = read_about(folder)
    return {
        "folder": folder.name,
        "kind": drafter.kind,
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "deepest": drafter.deepest,
        "about": asdict(about) if about else None,
    }


def _component(settings: Any) -> dict[str, Any]:
    return {"kind": settings.kind} | asdict(settings)
