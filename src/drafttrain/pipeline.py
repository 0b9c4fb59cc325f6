"""gen -> train -> export -> eval: the one module that sees a whole recipe, and hands each room its own section."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_section
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError, GateError, Interrupted
from drafttrain.core.files import folder_beside, write_json, write_text
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from drafttrain.data_gen.prepare import TrainingData
    from drafttrain.drafters import Drafter
    from drafttrain.losses import Loss
    from drafttrain.target import Target


class Run:
    """A recipe at work in its folder; what is loaded once is shared by the stages."""

    def __init__(self, recipe: Recipe, folder: Path, *, quiet: bool = False) -> None:
        _quiet_libraries()
        self.recipe = recipe
        self.resolved = dump_recipe(recipe)
        self.folder = RunFolder(folder)
        self.folder.open(self.resolved, quiet=quiet)
        if recipe.train.num_threads:
            import torch

            torch.set_num_threads(recipe.train.num_threads)

    @functools.cached_property
    def target(self) -> Target:
        """The target; loading it takes the time that it takes."""
        from drafttrain.target import Target

        return Target.load(self.recipe.target)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer; read without any weights when there is no target."""
        from drafttrain.target.frozen import load_target_tokenizer

        return load_target_tokenizer(self.recipe.target)

    def has_target(self) -> bool:
        """Tell whether the recipe names a target."""
        return self.recipe.target.model is not None


def fit(recipe: Recipe, folder: Path) -> None:
    """Do all stages of a recipe; the finished ones are skipped."""
    run = Run(recipe, folder)
    _gen(run)
    _train(run)
    _export(run)


def gen(recipe: Recipe, folder: Path) -> None:
    """Generate, encode and cache the data of a recipe."""
    run = Run(recipe, folder)
    _gen(run)
    _data(run)


def export(recipe: Recipe, folder: Path) -> None:
    """Write the drafter folder of a trained run, evaluate it, and hold it against the gate."""
    run = Run(recipe, folder)
    if not run.folder.train_done.exists():
        raise DrafttrainError(f"{folder}: nothing is trained here yet: drafttrain fit does all stages")
    for stale in (run.folder.eval, run.folder.report):
        stale.unlink(missing_ok=True)
    _export(run)


def evaluate_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Evaluate the exported files of a run, beside its own start, and write eval.json."""
    from drafttrain.eval.table import show

    run = Run(recipe, folder, quiet=True)
    drafter = run.folder.drafter if run.folder.drafter.exists() else run.folder.rejected
    if not drafter.exists():
        raise CheckpointError(f"{folder}: no drafter was exported here yet: drafttrain fit does all stages")
    folders = {"drafter": drafter}
    if run.folder.start.exists():
        folders["start"] = run.folder.start
    result = _evaluated(folders, run.target, recipe.eval, dropped=_dropped(run))
    write_json(run.folder.eval, result)
    show(result)
    return result


def evaluate_folders(folders: Sequence[Path], target: str | None, overrides: Sequence[str]) -> None:
    """Evaluate one drafter folder, or compare two, pairwise; eval.json and report.html are written into the first one."""
    from drafttrain.checkpoint import read_about
    from drafttrain.eval.report import write_report
    from drafttrain.eval.settings import EvalSettings
    from drafttrain.eval.table import show
    from drafttrain.target import Target, TargetSettings

    _quiet_libraries()
    settings = cast(EvalSettings, load_section("eval", overrides))
    about = read_about(folders[0])
    name = target or (about.target if about else None)
    if name is None:
        raise CheckpointError(f"{folders[0]}: does not say which target it was made for: give --target")
    names = ["A", "B"] if len(folders) == 2 else ["drafter"]
    for letter, folder in zip(names, folders, strict=True):
        say(f"{letter}: {folder}")
    result = _evaluated(
        dict(zip(names, folders, strict=True)), Target.load(TargetSettings(model=name)), settings, dropped=()
    )
    write_json(folders[0] / "eval.json", result)
    write_report(folders[0] / "report.html", result, title=folders[0].name, metrics=None, command=_command())
    show(result)
    say(f"written: {folders[0] / 'eval.json'}, {folders[0] / 'report.html'}")


def _gen(run: Run) -> None:
    from drafttrain.data_gen.prepare import generate_texts

    generate_texts(run.recipe.data, lambda: run.target, run.folder.data, seed=run.recipe.seed)


def _data(run: Run) -> TrainingData:
    """Return the training data, its rows cached where the recipe says so; note which evaluation prompts it spoils."""
    from drafttrain.data_gen.prepare import attach_cache, drop_contaminated, prepare
    from drafttrain.eval.prompts import read_prompts
    from drafttrain.target.frozen import tokenizer_fingerprint

    recipe = run.recipe
    data = prepare(
        recipe.data,
        run.folder.data,
        tokenizer=run.tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(run.tokenizer),
        seed=recipe.seed,
    )
    if _loss(recipe).needs_target:
        attach_cache(data, run.folder.data, run.target, num_records=recipe.train.max_steps * recipe.train.batch_size)
    overlap = run.folder.data / "overlap.json"
    if not overlap.exists():
        names = dict.fromkeys([recipe.eval.prompts, recipe.eval.validation_prompts])
        prompts = [
            p for name in names for p in read_prompts(name, run.tokenizer, prompt_tokens=recipe.eval.prompt_tokens)
        ]
        drop_contaminated(data, {prompt.id: prompt.tokens for prompt in prompts}, overlap)
    return data


def _dropped(run: Run) -> list[str]:
    path = run.folder.data / "overlap.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["dropped"]) if path.exists() else []


def _train(run: Run) -> None:
    if run.folder.train_done.exists():
        say("training: done before, skipped")
        return
    import torch

    # DeepSpeed, which Lightning imports, would otherwise warn that it had to look for a device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from drafttrain.drafters import drafters
    from drafttrain.train.run import train

    recipe = run.recipe
    data = _data(run)
    torch.manual_seed(recipe.seed)
    entry = cast(Any, drafters.entry(recipe.drafter.kind).component)
    target = run.target if run.has_target() else None
    drafter: Drafter = entry.create(recipe.drafter, target=target, tokenizer=run.tokenizer)
    drafter.fit_vocabulary(data.label_counts)
    loss = _loss(recipe)
    _write_drafter(run, drafter, run.folder.start, steps=0)
    count = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    say(f"training {count:,} parameters for {recipe.train.max_steps:,} steps")
    if target is not None:
        drafter.to(target.device)
    settings = recipe.train
    train(
        drafter,
        loss,
        target=target if loss.needs_target or drafter.needs() != _nothing() else None,
        of_step=lambda step: data.of_step(step, batch_size=settings.batch_size, accumulation=settings.accumulation),
        estimate=_estimator(run, target) if target is not None else None,
        settings=settings,
        vocab_size=target.num_tokens if target is not None else len(run.tokenizer),
        folder=run.folder.train,
    )


def _nothing() -> Any:
    from drafttrain.core.records import TargetNeeds

    return TargetNeeds()


def _loss(recipe: Recipe) -> Loss:
    from drafttrain.losses import losses

    loss: Loss = losses.build(recipe.loss)
    return loss


def _estimator(run: Run, target: Target) -> Callable[[Any], Mapping[str, Any]]:
    """Return the estimate of a drafter on the validation prompts: replay on what the target writes, written once."""
    from drafttrain.core.records import Sampling
    from drafttrain.data_gen.generate import Task, continuations
    from drafttrain.eval.prompts import read_prompts
    from drafttrain.eval.repetition import tokens_before_repetition
    from drafttrain.eval.replay import Text, expected_rounds, replay_rows

    recipe = run.recipe
    wanted = recipe.eval
    temperature = wanted.temperatures[0]
    sampling = Sampling() if temperature == 0 else Sampling(temperature, wanted.top_p, wanted.top_k)
    prompts = read_prompts(
        wanted.validation_prompts,
        run.tokenizer,
        prompt_tokens=wanted.prompt_tokens,
        dropped=_dropped(run),
        limit=recipe.train.eval_prompts,
    )
    tasks = [Task(prompt.id, list(prompt.tokens), sampling) for prompt in prompts]
    written = continuations(tasks, target, max_new_tokens=wanted.max_new_tokens, seed=recipe.seed)
    if wanted.repetition_ngram:
        written = [new[: max(1, tokens_before_repetition(new, ngram=wanted.repetition_ngram))] for new in written]
    texts = [Text(task.id, task.prompt, new) for task, new in zip(tasks, written, strict=True)]
    tokens = sum(len(text.new) for text in texts)
    length = getattr(wanted.length, "num_draft_tokens", 5)
    lengths = sorted({*wanted.replay_lengths, length})

    def estimate(drafter: Any) -> dict[str, Any]:
        rows = replay_rows(target, drafter, texts, sampling, num_depths=max(lengths))
        by_length = {k: tokens / sum(expected_rounds(r, k) for r in rows) for k in lengths}
        alpha = sum(float(r.acceptance_T.sum()) for r in rows) / tokens
        return {"block_efficiency": by_length[length], "alpha": alpha, "by_length": by_length}

    return estimate


def _write_drafter(run: Run, drafter: Drafter, folder: Path, *, steps: int) -> None:
    """Write a drafter in memory as an exported folder."""
    if folder.exists():
        return
    with folder_beside(folder.with_name(f"{folder.name}.weights")) as temporary:
        drafter.save(temporary)
    weights = folder.with_name(f"{folder.name}.weights")
    _export_weights(run, weights, folder, steps=steps)
    for file in weights.iterdir():
        file.unlink()
    weights.rmdir()


def _export_weights(run: Run, weights: Path, folder: Path, *, steps: int) -> None:
    from drafttrain.checkpoint import About
    from drafttrain.export.hf import export_hf
    from drafttrain.target.frozen import tokenizer_fingerprint

    recipe = run.recipe
    about = About(
        kind=recipe.drafter.kind,
        target=recipe.target.model or "",
        target_fingerprint=run.target.fingerprint if run.has_target() else "",
        tokenizer_fingerprint=tokenizer_fingerprint(run.tokenizer),
        vocab_size=len(run.tokenizer),
        trained_steps=steps,
    )
    export_hf(weights, folder, tokenizer=run.tokenizer, about=about, dtype=recipe.export.dtype)


def _export(run: Run) -> None:
    """Export the best weights, evaluate the files in a process of their own, write card and report, hold the gate."""
    from drafttrain.eval.gate import shortfalls
    from drafttrain.eval.report import write_report
    from drafttrain.eval.table import show
    from drafttrain.export.card import model_card

    recipe, folder = run.recipe, run.folder
    done = json.loads(folder.train_done.read_text(encoding="utf-8"))
    if folder.eval.exists() and (folder.drafter.exists() or folder.rejected.exists()):
        say("export and evaluation: done before, skipped")
        result = json.loads(folder.eval.read_text(encoding="utf-8"))
        show(result)
    else:
        _export_weights(run, folder.train / done["drafter"], folder.drafter, steps=done["best_step"])
        if not run.has_target():
            say(f"exported: {folder.drafter} (no target in this recipe, so nothing to evaluate it against)")
            return
        result = _evaluated_elsewhere(run)
    resolved, command = run.resolved, _command()
    best, last = done["best_block_efficiency"], done["last_block_efficiency"]
    if best is not None:
        say(
            f"exported: step {done['best_step']} ({best:.3f} by replay on validation prompts); last step {done['last_step']} ({last:.3f})"
        )
    write_report(folder.report, result, title=recipe.name, metrics=folder.train / "metrics.csv", command=command)
    short = shortfalls(result, recipe.export.require, drafter="drafter")
    kept = folder.rejected if short else folder.drafter
    for path in (folder.drafter, folder.rejected):
        if path.exists() and path != kept:
            if kept.exists():
                raise CheckpointError(f"{kept} and {path} are both there: remove one")
            os.replace(path, kept)
    card = model_card(recipe.name, result, drafter="drafter", recipe=resolved, command=command)
    write_text(kept / "README.md", card)
    say(f"drafter: {kept}")
    say(f"report:  {folder.report}")
    if short:
        raise GateError(f"gate not met, the drafter is in {kept}:\n" + "\n".join(f"  {line}" for line in short))


def _evaluated_elsewhere(run: Run) -> dict[str, Any]:
    """Evaluate in a fresh process that has read nothing but the files, and never imports the trainer."""
    command = [sys.executable, "-m", "drafttrain.cli", "eval", str(run.folder.path)]
    environment = dict(os.environ)
    if run.recipe.train.num_threads:
        environment["OMP_NUM_THREADS"] = str(run.recipe.train.num_threads)
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code == Interrupted.exit_code:
        raise Interrupted("stopped during the evaluation: run the same command to continue")
    if code != 0:
        raise DrafttrainError(f"the evaluation failed with exit code {code}")
    result: dict[str, Any] = json.loads(run.folder.eval.read_text(encoding="utf-8"))
    return result


def _evaluated(folders: Mapping[str, Path], target: Target, settings: Any, *, dropped: Sequence[str]) -> dict[str, Any]:
    from drafttrain.eval.evaluate import evaluate
    from drafttrain.eval.prompts import read_prompts

    prompts = read_prompts(
        settings.prompts,
        target.tokenizer,
        prompt_tokens=settings.prompt_tokens,
        dropped=dropped,
        limit=settings.num_prompts,
    )
    result = evaluate(folders, target, prompts, replace(settings, num_prompts=None))
    return result | {"prompts_dropped_for_overlap": len(dropped)}


def _command() -> str:
    return " ".join(["drafttrain", *sys.argv[1:]])


def _quiet_libraries() -> None:
    """Silence bars and hints of transformers; our own lines say what a user needs."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
