"""One evaluation: drafters against a target, on prompts, at temperatures; from rounds and forwards to eval.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.console import progress
from drafttrain.core.provenance import provenance
from drafttrain.core.records import Exactness, Generation, Prompt, Sampling
from drafttrain.core.roles import CostAware
from drafttrain.data_gen.checkers import checkers
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length import length_policies
from drafttrain.eval.metrics import PromptCounts, counts_of, histogram, mbsu, totals_of
from drafttrain.eval.parity import parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.quality import agreement, solved, task_score
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.statistics import ratio_difference, ratio_interval, ratio_of_ratios, sign_flip_p_value
from drafttrain.heads import check_made_for
from drafttrain.target import Target

FORMAT = 2
"""Version of eval.json; docs/eval_json.md describes it."""


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
    hf_seconds = _decode([*plains.values(), *arms], prompts, settings, hf=settings.speed_prompts if greedy else 0)
    # transformers' generate decodes with the first drafter's target.
    baselines = {key: _baseline(one, hf_seconds if one is plain else []) for key, one in plains.items()}
    rates = [
        _figures(arm, baselines[id(arm.target)], plains[id(arm.target)], prompts, sampling, settings) for arm in arms
    ]
    found: dict[str, Any] = {
        "temperature": temperature,
        "plain": _plain_figures(plain, hf_seconds),
        "drafters": {arm.name: figures for arm, figures in zip(arms, rates, strict=True)},
    }
    found["comparisons"] = {
        f"{first.name} - {other.name}": compare(
            _counts(first, settings), _counts(other, settings), resamples=settings.resamples, seed=settings.seed
        )
        for first, *others in by_length
        for other in others
    }
    judged, *at_other_lengths = [group[0] for group in by_length]
    found["comparisons"] |= {
        f"{judged.name} - {other.name}": compare(
            _counts(judged, settings), _counts(other, settings), resamples=settings.resamples, seed=settings.seed
        )
        | {"speed": _speed(judged, other, settings)}
        for other in at_other_lengths
    }
    return found


def _speed(arm: Arm, other: Arm, settings: EvalSettings) -> dict[str, float]:
    """Return how many times as many tokens a second an arm makes as another, on the same prompts, in turns."""
    parts = [([len(g.tokens) for g in a.generations], [g.seconds for g in a.generations]) for a in (arm, other)]
    return ratio_of_ratios(*parts, resamples=settings.resamples, seed=settings.seed).json()


def compare(
    first: Sequence[PromptCounts], second: Sequence[PromptCounts], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the difference in block efficiency of two drafters on the same prompts, first less second."""
    assert [c.id for c in first] == [c.id for c in second]
    parts = [([c.num_tokens for c in counts], [c.num_rounds for c in counts]) for counts in (first, second)]
    differences = [
        a.num_tokens / a.num_rounds - b.num_tokens / b.num_rounds for a, b in zip(first, second, strict=True)
    ]
    return {
        "block_efficiency": ratio_difference(parts[0], parts[1], resamples=resamples, seed=seed).json(),
        "p_value": sign_flip_p_value(differences, resamples=resamples, seed=seed),
    }


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


def _decode(arms: Sequence[Arm], prompts: Sequence[Prompt], settings: EvalSettings, *, hf: int) -> list[float]:
    """Decode every prompt with every arm, in turns whose order alternates; return the seconds of transformers' generate."""
    for arm in arms:
        arm.engine.generate(prompts[:1])
        if isinstance(arm.engine.policy, CostAware):
            arm.engine.policy.calibrate(arm.ledger.rounds())
        arm.ledger.events.clear()
    hf_seconds: list[float] = []
    groups = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]
    temperature = arms[0].engine.sampling.temperature
    with progress(f"decoding at temperature {temperature:g}", total=len(prompts), unit="prompts") as bar:
        for number, group in enumerate(groups):
            for arm in arms if number % 2 == 0 else reversed(arms):
                arm.generations += arm.engine.generate(group)
            if settings.batch_size == 1 and number < hf:
                hf_seconds.append(_hf_seconds(group[0], arms[0].target, settings))
            bar.advance(len(group))
    return hf_seconds


@torch.no_grad()
def _hf_seconds(prompt: Prompt, target: Target, settings: EvalSettings) -> float:
    tokens = torch.tensor([list(prompt.tokens)], device=target.device)
    began = time.perf_counter()
    target.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=list(target.eos_token_ids) or None,
        pad_token_id=target.tokenizer.pad_token_id or 0,
    )
    return time.perf_counter() - began


def _counts(arm: Arm, settings: EvalSettings) -> list[PromptCounts]:
    return [counts_of(one, repetition_ngram=settings.repetition_ngram) for one in arm.generations]


@dataclass(frozen=True)
class Baseline:
    """The target alone, decoded in turns with the drafters: tokens and seconds of the first prompts."""

    name: str
    tokens: Sequence[int]
    seconds: Sequence[float]


def _baseline(plain: Arm, hf_seconds: Sequence[float]) -> Baseline:
    """Return the faster of plain decoding and transformers' generate on the prompts that both had."""
    seconds = [g.seconds for g in plain.generations]
    tokens = [len(g.tokens) for g in plain.generations]
    count = len(hf_seconds)
    if hf_seconds and sum(hf_seconds) < sum(seconds[:count]):
        return Baseline("transformers' generate", tokens[:count], hf_seconds)
    return Baseline("plain decoding, same engine", tokens, seconds)


def _figures(
    arm: Arm, baseline: Baseline, plain: Arm, prompts: Sequence[Prompt], sampling: Sampling, settings: EvalSettings
) -> dict[str, Any]:
    """Return all figures of one drafter at one temperature."""
    assert arm.drafter is not None
    resamples = {"resamples": settings.resamples, "seed": settings.seed}
    counts = _counts(arm, settings)
    totals, whole = totals_of(counts), totals_of([counts_of(one) for one in arm.generations])
    rounds = [c.num_rounds for c in counts]
    ledger = arm.ledger
    target_calls = ledger.calls("target")
    tokens, seconds = [len(g.tokens) for g in arm.generations], [g.seconds for g in arm.generations]
    same = len(baseline.tokens)
    figures: dict[str, Any] = {
        "length": _component(arm.length),
        "block_efficiency": ratio_interval([c.num_tokens for c in counts], rounds, **resamples).json(),
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
        "tokens_per_second": ratio_interval(tokens, seconds, **resamples).json(),
        "speedup": ratio_of_ratios(
            (tokens[:same], seconds[:same]), (baseline.tokens, baseline.seconds), **resamples
        ).json()
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
        figures["task"] = task_score(scores[0], scores[1], **resamples)
    if sampling.temperature == 0 and lossy:
        figures["agreement"] = agreement(plain.generations, arm.generations, **resamples)
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
    resamples = {"resamples": settings.resamples, "seed": settings.seed}
    alpha = ratio_interval([r.acceptance_T.sum() for r in rows], tokens, **resamples).json()
    if arm.engine.rule.exactness is Exactness.LOSSY:
        # A lossy rule's text is not of the target's law, which replay takes it to be.
        return {"alpha": alpha, "replay": {}}
    return {
        "alpha": alpha,
        "replay": {
            str(k): ratio_interval(tokens, [expected_rounds(r, k) for r in rows], **resamples).json()
            for k in settings.replay_lengths
        },
    }


def _plain_figures(plain: Arm, hf_seconds: Sequence[float]) -> dict[str, Any]:
    generations = plain.generations
    found: dict[str, Any] = {
        "num_tokens": sum(len(g.tokens) for g in generations),
        "target_calls": plain.ledger.calls("target"),
        "tokens_per_second": sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations),
    }
    if hf_seconds:
        same = generations[: len(hf_seconds)]
        tokens = sum(len(g.tokens) for g in same)
        found["same_prompts"] = {
            "num_prompts": len(hf_seconds),
            "plain_tokens_per_second": tokens / sum(g.seconds for g in same),
            "transformers_generate_tokens_per_second": tokens / sum(hf_seconds),
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
