"""drafttrain calibrate: make a confidence of draft tokens a chance of acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of
from drafttrain.config.load import load_sections
from drafttrain.core.calibration import Calibration, calibration
from drafttrain.core.console import progress, say, table
from drafttrain.core.errors import CheckpointError, DrafttrainError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.provenance import provenance
from drafttrain.core.recalibration import FITS, ChanceMap
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.engine import Engine
from drafttrain.eval.evaluate import choose_draft
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.confidence import ConfidenceSettings
from drafttrain.eval.noted_confidence import NotedConfidence
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.recalibrated import HasConfidence
from drafttrain.eval.settings import EvalSettings
from drafttrain.heads.folder import check_made_for
from drafttrain.heads.token_head import MadeFor
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target
from drafttrain.target_model.folders import fingerprint_of

FILE = "calibration.json"
LEAST_PAIRS = 50
"""Of each half of the prompts. A map that is fitted on fewer says nothing."""
AS_IT_IS = "as it is"

Pairs = Sequence[tuple[float, bool]]


@dataclass(frozen=True)
class Calibrated:
    """What was fitted, and the figures on other prompts."""

    map: ChanceMap
    held_out: dict[str, Calibration]
    """By method, and of the confidence as it is."""


def calibrate(
    drafter: str, target: str | None, overrides: Sequence[str], *, method: str, temperature: float, out: Path | None
) -> Calibrated:
    """Decode prompts, fit a map on every other one, print its figures on those between them, and write it.

    Args:
        drafter: A folder, a run folder, a hub id or a builtin drafter.
        target: None: the drafter's own.
        overrides: Overrides of the sections target and eval. `eval.length` says whose confidence it is.
        method: isotonic, temperature or platt.
        out: The file; None: calibration.json in the drafter's folder, if it is local.

    Raises:
        RecipeError: An argument or an override is wrong.
        CheckpointError: The drafter does not fit the target, or its drafts cannot be compared token by token.
        DrafttrainError: Too few draft tokens were tested.
    """
    quiet_libraries()
    of_target, settings = load_sections(["target", "eval"], overrides)
    settings = _with_confidence(settings, chosen=any(one.startswith("eval.length") for one in overrides), method=method)
    policy: HasConfidence = length_policies.build(settings.length)
    folder = folders_of([drafter])[0]
    of_target = evaluated_on(of_target, folder, named=drafter, target=target, overrides=overrides)
    check_drafters(of_target, [str(folder)])
    loaded = Target.load(of_target)
    prompts = read_prompts(
        settings.prompts, loaded.tokenizer, prompt_tokens=settings.prompt_tokens, limit=settings.num_prompts
    )
    pairs = [_pairs(loaded, folder, policy, half, settings, temperature) for half in (prompts[::2], prompts[1::2])]
    fitted = _fitted(pairs[0], pairs[1], method=method)
    _show(fitted, policy.confidence, pairs[1], num_prompts=len(prompts[1::2]), method=method, temperature=temperature)
    out = out or (folder / FILE if Path(drafter).is_dir() else None)
    if out is None:
        say(f"{FILE}: not written: give --out FILE")
        return fitted
    made_for = MadeFor(loaded.name, loaded.fingerprint, drafter, fingerprint_of(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        out,
        {
            "confidence": policy.confidence,
            "map": fitted.map.as_json(),
            "made_for": asdict(made_for),
            "temperature": temperature,
            "length": component_mapping(settings.length),
            "rule": component_mapping(settings.rule),
            "fitted_on": {"prompts": len(prompts[::2]), "pairs": len(pairs[0])},
            "held_out": {name: asdict(figures) for name, figures in fitted.held_out.items()},
            "provenance": provenance(),
        },
    )
    say(f"written: {out}. Use it with 'eval.length={{kind: {settings.length.kind}, calibration: {out}}}'")
    return fitted


def _with_confidence(settings: EvalSettings, *, chosen: bool, method: str) -> EvalSettings:
    """Return settings whose length policy decides by a confidence: `confidence` if the arguments name none."""
    length: Any = settings.length if chosen else ConfidenceSettings()
    problems = []
    if not isinstance(length_policies.build(length), HasConfidence):
        able = [name for name in length_policies.names() if hasattr(length_policies.entry(name).component, "noted")]
        problems.append(f"eval.length: {length.kind} decides by no confidence: choose one of {', '.join(able)}")
    elif length.calibration is not None:
        problems.append("eval.length.calibration: the confidence is calibrated as it is: leave it out")
    if method not in FITS:
        problems.append(f"--method: must be one of {', '.join(FITS)}, got {method!r}")
    if problems:
        raise RecipeError("arguments", problems)
    return replace(settings, length=length)


def _pairs(
    target: Target,
    folder: Path,
    policy: HasConfidence,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    temperature: float,
) -> Pairs:
    """Return (confidence, accepted) of every tested draft token of some prompts."""
    if (head := getattr(settings.length, "head", None)) is not None:
        check_made_for(Path(head), target=target, drafter=folder)
    drafter = read_drafter(folder, target)
    choose_draft(drafter, settings)
    if drafter.drafts_strings:
        raise CheckpointError(
            "eval.across_tokenizers is strings: draft tokens are encoded again, so a confidence is in no single token: set tokens"
        )
    own, notes = drafter.adapted(target), NotedConfidence(policy)
    engine = Engine(
        own,
        drafter.proposer(own),
        rule=acceptance_rules.build(settings.rule),
        policy=notes,
        sampling=Sampling() if temperature == 0 else Sampling(temperature, settings.top_p, settings.top_k),
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
    )
    with progress(f"decoding at temperature {temperature:g}", total=len(prompts), unit="prompts") as bar:
        for start in range(0, len(prompts), settings.batch_size):
            group = prompts[start : start + settings.batch_size]
            engine.generate(group)
            bar.advance(len(group))
    if len(notes.pairs) < LEAST_PAIRS:
        raise DrafttrainError(
            f"{len(notes.pairs)} draft tokens of {len(prompts)} prompts were tested, at least {LEAST_PAIRS} are needed: give more prompts "
            "(eval.prompts, eval.num_prompts) or longer outputs (eval.max_new_tokens)"
        )
    return notes.pairs


def _fitted(pairs: Pairs, held_out: Pairs, *, method: str) -> Calibrated:
    """Return the map of a method, and the figures of all methods on held-out pairs."""
    maps = {name: fit(*zip(*pairs, strict=True)) for name, fit in FITS.items()}
    confidence_N, accepted_N = zip(*held_out, strict=True)
    figures = {AS_IT_IS: calibration(confidence_N, accepted_N)}
    figures |= {name: calibration(each(confidence_N), accepted_N) for name, each in maps.items()}
    return Calibrated(maps[method], figures)


def _show(
    fitted: Calibrated, confidence: str, held_out: Pairs, *, num_prompts: int, method: str, temperature: float
) -> None:
    rows = [
        (
            f"{name} (written)" if name == method else name,
            *(
                f"{value:.4f}"
                for value in (one.mean_predicted, one.mean_label, one.ece, one.brier, one.log_likelihood, one.auc)
            ),
        )
        for name, one in fitted.held_out.items()
    ]
    columns = ["confidence", "mean", "accepted", "ECE", "Brier", "log-likelihood", "AUC"]
    title = f"{confidence}, temperature {temperature:g}: {len(held_out)} draft tokens of {num_prompts} prompts that no map was fitted on"
    table(rows, columns=columns, title=title)
