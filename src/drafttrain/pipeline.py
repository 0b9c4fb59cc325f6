"""gen -> train -> export -> eval: the one module that sees a whole recipe, and hands each room its own section."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_recipe, load_sections
from drafttrain.config.made_by import MADE_BY, made_by_recipes
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import (
    CheckpointError,
    DataError,
    DrafttrainError,
    GateError,
    Interrupted,
    RecipeError,
)
from drafttrain.core.files import clear_leftovers, folder_beside, write_json, write_text
from drafttrain.core.processes import (
    first,
    first_before_others,
    launched,
    shared,
    together,
    wait_for_all,
    without_launcher,
    world,
)
from drafttrain.export_stages import (
    ENGINES,
    Stand,
    check_engines,
    folder_as,
    formats_are_current,
    formats_of,
    only,
    verified,
    write_engine_card,
    write_formats,
)
from drafttrain.head_stages import (
    export_trained_head,
    exported_head,
    figures_of_head,
    fit_head,
    labelled_tokens,
    with_own_head,
)
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from drafttrain.core.records import Prompt, Sampling
    from drafttrain.data_gen.prepare import TrainingData
    from drafttrain.drafters import Drafter
    from drafttrain.eval.replay import Text
    from drafttrain.eval.settings import EvalSettings
    from drafttrain.losses import Loss
    from drafttrain.target import Target

TEXTS_AT_ONCE = 16


class Run:
    """A recipe at work in its folder; what is loaded once is shared by the stages.

    Args:
        placement: Of the target, while data is made and the drafter trained (`train.target_placement`).
    """

    def __init__(self, recipe: Recipe, folder: Path, *, quiet: bool = False, placement: str = "replicated") -> None:
        _quiet_libraries()
        self.recipe = recipe
        self.placement = placement
        self.resolved = dump_recipe(recipe)
        self.folder = RunFolder(folder)
        with first_before_others("it opens the run folder"):
            if first():
                self.folder.open(recipe, quiet=quiet)
        if recipe.train.num_threads:
            import torch

            torch.set_num_threads(recipe.train.num_threads)

    @functools.cached_property
    def target(self) -> Target:
        """The target; loading it takes the time that it takes."""
        target = self._load_target()
        target.check_length(self.recipe.data.max_length, what="data.max_length")
        return target

    def _load_target(self) -> Target:
        if self.placement == "absent":
            from drafttrain.target.absent import AbsentTarget

            return AbsentTarget.load(self.recipe.target)
        if self.placement == "sharded":
            from drafttrain.train.sharded_target import ShardedTarget

            return ShardedTarget.load(self.recipe.target)
        from drafttrain.target import Target

        return Target.load(self.recipe.target)

    @functools.cached_property
    def told_target(self) -> Target:
        """The target as it answers on the validation texts: itself where it is whole, else what was stored of it, once.

        Every process must come here, before one of them needs it alone.
        """
        if self.placement == "replicated":
            return self.target
        from drafttrain.data_gen.told import told

        texts, _ = self.validation_texts
        of_data = self.recipe.data
        return told(
            self.folder.validation,
            [[*text.prompt, *text.new] for text in texts],
            self.target,
            needs=self.drafter.needs(),
            dtype=of_data.cache_dtype,
            max_gb=of_data.max_cache_gb,
        )

    def leave_the_others(self) -> None:
        """Go on in this process alone: a target that is spread over all cannot be run any more."""
        if self.placement == "sharded":
            self.placement = "absent"
            for name in ("target", "told_target", "drafter"):
                self.__dict__.pop(name, None)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer; read without any weights when there is no target."""
        from drafttrain.target.frozen import load_target_tokenizer

        return load_target_tokenizer(self.recipe.target)

    @property
    def num_tokens(self) -> int:
        """Ids that target, drafter and tokenizer share."""
        return self.target.num_tokens if self.has_target() else len(self.tokenizer)

    @functools.cached_property
    def validation_texts(self) -> tuple[list[Text], Sampling]:
        """What the target writes after the validation prompts, and how it is drawn."""
        from drafttrain.core.records import Sampling
        from drafttrain.data_gen import told
        from drafttrain.data_gen.backends import Task
        from drafttrain.data_gen.backends.builtin import continuations
        from drafttrain.eval.prompts import read_prompts
        from drafttrain.eval.repetition import tokens_before_repetition
        from drafttrain.eval.replay import Text

        recipe, wanted = self.recipe, self.recipe.eval
        temperature = wanted.temperatures[0]
        sampling = Sampling() if temperature == 0 else Sampling(temperature, wanted.top_p, wanted.top_k)
        prompts = read_prompts(
            wanted.validation_prompts,
            self.tokenizer,
            prompt_tokens=wanted.prompt_tokens,
            dropped=dropped_prompts(self, wanted.validation_prompts),
            limit=recipe.train.eval_prompts,
        )
        _check_lengths(self.target, prompts, wanted)
        tasks = [Task(prompt.id, list(prompt.tokens), sampling) for prompt in prompts]
        if self.placement == "replicated":
            written = continuations(tasks, self.target, max_new_tokens=wanted.max_new_tokens, seed=recipe.seed)
        else:
            kept = self.folder.validation / "texts.json"
            written = told.written(kept, tasks, self.target, max_new_tokens=wanted.max_new_tokens, seed=recipe.seed)
        if wanted.repetition_ngram:
            written = [new[: max(1, tokens_before_repetition(new, ngram=wanted.repetition_ngram))] for new in written]
        texts = [Text(task.id, task.prompt, new) for task, new in zip(tasks, written, strict=True)]
        return texts, sampling

    @functools.cached_property
    def drafter(self) -> Drafter:
        """The drafter as its settings make it, before anything is trained."""
        return _created(self, self.recipe.drafter)

    def has_target(self) -> bool:
        """Tell whether the recipe names a target."""
        return self.recipe.target.model is not None


def fit(recipe: Recipe, folder: Path, *, above: Sequence[str] = ()) -> None:
    """Do all stages of a recipe; the finished ones are skipped. With a section `online`: learn once from the logs there are.

    Several processes generate, cache and train together; then the first one exports and evaluates.

    Args:
        above: Recipes that wait for what this one makes.
    """
    if recipe.online is not None:
        online(recipe, folder, once=True)
        return
    check_engines(recipe.export.verify)
    with contextlib.ExitStack() as held:
        with _all_processes(recipe, folder, held):
            made = _with_models_made(recipe, folder.parent, above=above)
            run = Run(made, folder, placement=recipe.train.target_placement)
            if first() and not run.folder.train_done.exists():
                # Figures of an export of what was there so far; a kill after the training would let them stand for its end.
                run.folder.drop_figures()
            _gen(run)
            if run.recipe.head is not None:
                _fit_head(run)
            else:
                train_drafter(run)
        if first():
            run.leave_the_others()
            _export(run)


def _with_models_made(recipe: Recipe, runs: Path, *, above: Sequence[str] = ()) -> Recipe:
    """Return the recipe with folders where it names other recipes, whose runs in `runs` are brought up to date first.

    Raises:
        RecipeError: A recipe needs what it makes itself.
    """
    recipe = copy.deepcopy(recipe)
    for settings, key in made_by_recipes(recipe):
        name = getattr(settings, key).removeprefix(MADE_BY)
        made = load_recipe(name)
        path = [*above, recipe.name, made.name]
        if made.name in path[:-1]:
            raise RecipeError(name, [f"{key}: a recipe cannot need what it makes: {' needs '.join(path)}"])
        say(f"{recipe.name}: {key} is what {made.name} makes: {runs / made.name}")
        fit(made, runs / made.name, above=path[:-1])
        wait_for_all(f"{made.name} is exported")
        of_run = RunFolder(runs / made.name)
        setattr(settings, key, str(of_run.head if made.head is not None else of_run.drafter))
    return recipe


def online(recipe: Recipe, folder: Path, *, once: bool = False) -> None:
    """Learn from serving logs and publish what is better: once, or until the process is told to stop."""
    from drafttrain.online.loop import alone
    from drafttrain.online_stages import online_run, report, show_status

    if recipe.online is None:
        raise RecipeError(recipe.name, ["online: missing: this recipe trains once; drafttrain fit does"])
    with alone(folder):
        run = Run(recipe, folder)
        _write_drafter(run, run.drafter, run.folder.start, steps=0)
        learning = online_run(recipe, run.folder, run.target)
        try:
            learning.once() if once else learning.for_ever()
        finally:
            report(run.folder, title=recipe.name)
    show_status(folder)


def rollback(folder: Path, *, route: str | None = None) -> None:
    """Serve the version again that the current one replaced; one of several drafters is named by its route."""
    from drafttrain.online.loop import lanes_of
    from drafttrain.online.versions import Versions

    lanes = lanes_of(folder)
    if (route or "") not in lanes:
        known = ", ".join(name for name in lanes if name)
        raise RecipeError("arguments", [f"several drafters are here: give one of {known} after the folder"])
    held = RunFolder(folder).held()
    settings = held.online if held is not None and held.online is not None else None
    hook = settings.on_publish if settings else []
    timeout = settings.hook_timeout_seconds if settings else 60.0
    versions = Versions(lanes[route or ""].folder, hook=hook, hook_timeout_seconds=timeout)
    before, now = versions.rollback()
    say(f"{versions.folder / 'current'}: {now} again, instead of {before}")


def gen(recipe: Recipe, folder: Path) -> None:
    """Generate, encode, label and cache the data of a recipe; several processes share the work."""
    with contextlib.ExitStack() as held, _all_processes(recipe, folder, held):
        made = _with_models_made(recipe, folder.parent)
        run = Run(made, folder, placement=recipe.train.target_placement)
        _gen(run)
        data = training_data(run)
        if run.placement == "absent":
            # What the training will ask of the target, so that it need not be there.
            run.told_target  # noqa: B018
        if run.recipe.head is not None:
            with first_before_others("it labels draft tokens"):
                labelled_tokens(run.recipe, run.folder, run.target, data)


@contextlib.contextmanager
def _all_processes(recipe: Recipe, folder: Path, held: contextlib.ExitStack) -> Iterator[None]:
    """Join the processes that a launcher started, and look that they can work together, before anything is loaded.

    Args:
        held: Until it closes, the first process holds the run folder.
    """
    settings = recipe.train
    if settings.target_placement == "sharded" and not launched():
        problem = "there is one process, and nothing to spread a target over: start several (docs/multi-node.md)"
        raise RecipeError(recipe.name, [f"train.target_placement: sharded: {problem}"])
    with together(timeout_seconds=settings.timeout_seconds):
        if launched():
            from drafttrain.train.preflight import check_processes

            check_processes(recipe.name, dump_recipe(recipe), folder, settings)
        with first_before_others("it takes the run folder and clears what a killed run left"):
            if first():
                held.enter_context(RunFolder(folder).taken())
                clear_leftovers(folder)
        yield


def _fit_head(run: Run) -> None:
    data = training_data(run)
    with first_before_others("it labels draft tokens"):
        labelled = labelled_tokens(run.recipe, run.folder, run.target, data)
    fit_head(run.recipe, run.folder, labelled)


def export(recipe: Recipe, folder: Path) -> None:
    """Write the drafter folder of a run, evaluate it, and hold it against the gate.

    A training that has not ended gives what it has: the best weights so far, or those of its newest checkpoint.
    """
    if not RunFolder(folder).has_weights():
        raise DrafttrainError(f"{folder}: nothing is trained here yet: drafttrain fit does all stages")
    check_engines(recipe.export.verify)
    run = Run(_with_models_made(recipe, folder.parent), folder)
    run.folder.drop_figures()
    _export(run)


def export_run_as(recipe: Recipe, folder: Path, formats: Sequence[str], *, verify: bool, out: Path | None) -> None:
    """Write the exported drafter of a run in further formats, and prove them in serving engines or not."""
    recipe = _with_models_made(recipe, folder.parent)
    here = RunFolder(folder)
    source = next((place for place in (here.drafter, here.rejected) if place.exists()), None)
    if source is None or recipe.drafter is None:
        raise CheckpointError(f"{folder}: no drafter was exported here yet: drafttrain fit does all stages")
    dropped = json.loads(here.overlap.read_text(encoding="utf-8"))["dropped"] if here.overlap.exists() else []
    stand = Stand(
        target=recipe.target,
        eval=recipe.eval,
        export=only(recipe.export, formats, verify=verify),
        dropped=[id for name, id in dropped if name == recipe.eval.prompts],
    )
    _export_as(source, stand, out=out)


def export_drafter_as(
    drafter: str,
    formats: Sequence[str],
    overrides: Sequence[str],
    *,
    target: str | None,
    verify: bool,
    out: Path | None,
) -> None:
    """Write a drafter folder in further formats, and prove them in serving engines or not.

    Args:
        overrides: Of the sections target, eval and export.
        target: Its model; left out, the one that the drafter was made for.
    """
    from drafttrain.checkpoint import read_about

    _quiet_libraries()
    of_target, of_eval, of_export = load_sections(["target", "eval", "export"], overrides)
    (source,) = _folders([drafter])
    about = read_about(source)
    target = target or (about.target if about else None)
    if not target and not any(override.startswith("target.model=") for override in overrides):
        raise CheckpointError(f"{drafter}: does not say which target it was made for: give --target")
    stand = Stand(
        target=replace(of_target, model=target) if target else of_target,
        eval=of_eval,
        export=only(of_export, formats, verify=verify),
    )
    _export_as(source, stand, out=out)


def import_drafter(folder: Path, *, target: str | None, out: Path | None) -> None:
    """Write the drafter folder of one that somebody else trained, and say what was changed on the way.

    Args:
        target: What it was made for; left out, what it says itself.
        out: Left out: beside it.
    """
    from drafttrain.importers.convert import import_folder

    _quiet_libraries()
    folder = folder.resolve()
    out = out or folder.with_name(f"{folder.name}.drafter")
    made = import_folder(folder, out, target=target)
    for note in made.notes:
        say(f"{folder.name}: {note}")
    say(f"imported: {out} (drafter.kind {made.files.kind})")


def _export_as(source: Path, stand: Stand, *, out: Path | None) -> None:
    _quiet_libraries()
    check_engines(stand.export.verify)
    folders = write_formats(source, stand.export, stand.target, out=out)
    comparisons = verified(source, folders, stand)
    for format, folder in folders.items():
        write_engine_card(folder, source, [one for one in comparisons if one["format"] == format])
    if comparisons:
        write_engine_card(source, source, comparisons)
    failed = [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    if failed:
        raise GateError(
            "a serving engine does not do what the evaluator does:\n" + "\n".join(f"  {line}" for line in failed)
        )


def evaluate_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Evaluate the exported files of a run, beside its own start, and write eval.json."""
    from drafttrain.eval.table import show

    here = RunFolder(folder)
    what, places = (
        ("head", (here.head, here.rejected_head)) if recipe.head else ("drafter", (here.drafter, here.rejected))
    )
    exported = next((place for place in places if place.exists()), None)
    held = here.held()
    if held is None or exported is None:
        raise CheckpointError(f"{folder}: no {what} was exported here yet: drafttrain fit does all stages")
    recipe = _with_models_made(recipe, folder.parent)
    # The files were exported as the run says, whatever the recipe now asks of an export.
    run = Run(replace(recipe, export=held.export), folder, quiet=True)
    if recipe.head is not None:
        result = _evaluated_head(run)
    else:
        folders = {"drafter": exported}
        if run.folder.start.exists():
            folders["start"] = run.folder.start
        result = _evaluated(folders, run.target, recipe.eval, dropped=dropped_prompts(run, recipe.eval.prompts))
    write_json(run.folder.eval, result)
    show(result)
    return result


def evaluate_drafters(
    drafters: Sequence[str], target: str | None, overrides: Sequence[str], *, out: Path | None = None
) -> None:
    """Evaluate one drafter, or compare two, pairwise: local folders, hub ids or builtin ones.

    Args:
        target: Its model; left out, the one that the first drafter was made for.
        overrides: Of the sections target and eval.
        out: Folder for eval.json and report.html; left out, the first drafter's if it is a local folder.
    """
    from drafttrain.checkpoint import read_about
    from drafttrain.eval.report import write_report
    from drafttrain.eval.table import show
    from drafttrain.target import Target

    _quiet_libraries()
    of_target, settings = load_sections(["target", "eval"], overrides)
    folders = _folders(drafters)
    if target is None and not any(override.startswith("target.model=") for override in overrides):
        about = read_about(folders[0])
        if about is None:
            raise CheckpointError(f"{drafters[0]}: does not say which target it was made for: give --target")
        target = about.target
    names = ["A", "B"] if len(folders) == 2 else ["drafter"]
    for letter, drafter in zip(names, drafters, strict=True):
        say(f"{letter}: {drafter}")
    loaded = Target.load(replace(of_target, model=target) if target else of_target)
    result = _evaluated(dict(zip(names, folders, strict=True)), loaded, settings, dropped=())
    show(result)
    if out is None and not Path(drafters[0]).is_dir():
        say("eval.json and report.html: not written, --out DIR says where to")
        return
    out = out or folders[0]
    write_json(out / "eval.json", result)
    write_report(out / "report.html", result, title=folders[0].name, metrics=None, command=_command())
    say(f"written: {out / 'eval.json'}, {out / 'report.html'}")


def _folders(drafters: Sequence[str]) -> list[Path]:
    """Return the local folders of drafters, or every one that cannot be found."""
    from drafttrain.target.frozen import resolve_folder

    folders, problems = [], []
    for name in drafters:
        try:
            folders.append(resolve_folder(name))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("arguments", problems)
    return folders


def _gen(run: Run) -> None:
    from drafttrain.data_gen.prepare import generate_texts
    from drafttrain.export.engines import engine_of
    from drafttrain.export.engines.environment import ask

    def ask_engine(name: str, worker: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return ask(engine_of(name), request, worker=worker, timeout_seconds=None)

    generate_texts(run.recipe.data, lambda: run.target, run.folder.data, seed=run.recipe.seed, ask_engine=ask_engine)


def training_data(run: Run) -> TrainingData:
    """Return the training data, what the target knows of it cached where the recipe says so; note which prompts it spoils."""
    from drafttrain.data_gen.prepare import attach_cache

    recipe = run.recipe
    with first_before_others("it encodes the sources"):
        data = _prepared(run)
    if recipe.drafter is not None and recipe.data.cache != "none" and run.has_target():
        if reason := run.drafter.why_not_cached():
            raise DataError(f"data.cache: {recipe.drafter.kind}: {reason}; set data.cache: none")
        attach_cache(
            data,
            run.folder.data,
            run.target,
            num_records=recipe.train.max_steps * recipe.train.batch_size,
            law=_loss(recipe).needs_target,
            needs=run.drafter.needs(),
        )
    with first_before_others("it looks for overlap with the evaluation prompts"):
        if not run.folder.overlap.exists():
            _note_overlap(run, data)
    return data


def _prepared(run: Run) -> TrainingData:
    from drafttrain.data_gen.prepare import prepare
    from drafttrain.target.frozen import tokenizer_fingerprint

    return prepare(
        run.recipe.data,
        run.folder.data,
        tokenizer=run.tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(run.tokenizer),
        seed=run.recipe.seed,
    )


def _note_overlap(run: Run, data: TrainingData) -> None:
    from drafttrain.data_gen.prepare import drop_contaminated
    from drafttrain.eval.prompts import read_prompts

    wanted = run.recipe.eval
    prompts = {
        (file, prompt.id): prompt.tokens
        for file in dict.fromkeys([wanted.prompts, wanted.validation_prompts])
        for prompt in read_prompts(file, run.tokenizer, prompt_tokens=wanted.prompt_tokens)
    }
    drop_contaminated(data, prompts, run.folder.overlap)


def dropped_prompts(run: Run, file: str) -> list[str]:
    """Return the ids of a file's prompts that the training text spoils; files that are new to the run are looked up now."""
    path = run.folder.overlap
    if not path.exists() and run.folder.data.exists():
        _note_overlap(run, _prepared(run))
    found = json.loads(path.read_text(encoding="utf-8"))["dropped"] if path.exists() else []
    return [id for name, id in found if name == file]


def train_drafter(run: Run) -> None:
    """Train from the start to the best step, or continue where an earlier run stopped; skipped when it is done."""
    if run.folder.train_done.exists():
        say("training: done before, skipped")
        return
    wait_for_all("they begin to train")
    from drafttrain.train.run import train

    recipe = run.recipe
    data = training_data(run)
    target = None
    if run.has_target():
        target = run.target
        if run.placement != "replicated":
            run.told_target  # noqa: B018
            target.rest()
    drafter = _start(run, data)
    loss = _loss(recipe)
    settings = recipe.train
    say(f"training {_trained(drafter):,} parameters for {settings.max_steps:,} steps")
    train(
        drafter,
        loss,
        target=target if loss.needs_target or drafter.needs() != _nothing() else None,
        of_step=own_batches(data, settings),
        estimate=_estimator(run, run.told_target) if target is not None else None,
        settings=settings,
        vocab_size=run.num_tokens,
        folder=run.folder.train,
    )
    if first():
        run.folder.drop_figures()


def own_batches(data: Any, settings: Any) -> Callable[[int], list[Any]]:
    """Return the micro-batches of a step that are this process's."""
    here = world()
    return lambda step: data.of_step(
        step,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        rank=here.rank,
        world_size=here.size,
    )


def _start(run: Run, data: TrainingData) -> Drafter:
    """Return the drafter as distillation finds it, and keep it as a folder: made as its settings say, then pretrained or not."""
    recipe, start = run.recipe, run.folder.start
    if recipe.train.pretrain is None:
        run.drafter.fit_vocabulary(data.label_counts)
        with first_before_others("it writes the drafter's start"):
            _write_drafter(run, run.drafter, start, steps=0)
        return run.drafter
    if not all(shared(start.exists())):
        _pretrain(run, data.plain())
    return _created(run, replace(recipe.drafter, init="checkpoint", checkpoint=str(start)))


def _pretrain(run: Run, plain: TrainingData) -> None:
    """Train on plain text with cross-entropy, and export that as the start."""
    from drafttrain.losses.ce import CrossEntropy
    from drafttrain.train.run import train

    settings, folder = run.recipe.train.of_pretraining(), run.folder.pretrain
    drafter = run.drafter
    say(f"pretraining {_trained(drafter):,} parameters for {settings.max_steps:,} steps")
    done = train(
        drafter,
        CrossEntropy(),
        target=None,
        of_step=own_batches(plain, settings),
        estimate=None,
        settings=settings,
        vocab_size=run.num_tokens,
        folder=folder,
    )
    with first_before_others("it writes the drafter's start"):
        if first():
            _export_weights(run, folder / done.drafter, run.folder.start, steps=done.last_step)


def _created(run: Run, settings: Any) -> Drafter:
    """Return the drafter of these settings on the target's device, or where a target would be."""
    import torch

    from drafttrain.drafters import drafters
    from drafttrain.target.frozen import pick_device

    torch.manual_seed(run.recipe.seed)
    target = run.target if run.has_target() else None
    entry = cast(Any, drafters.entry(settings.kind).component)
    drafter: Drafter = entry.create(settings, target=target, tokenizer=run.tokenizer)
    return drafter.to(target.device if target is not None else pick_device(run.recipe.target.device))


def _trained(drafter: Drafter) -> int:
    return sum(p.numel() for p in drafter.parameters() if p.requires_grad)


def _nothing() -> Any:
    from drafttrain.core.records import TargetNeeds

    return TargetNeeds()


def _loss(recipe: Recipe) -> Loss:
    from drafttrain.losses import losses

    loss: Loss = losses.build(recipe.loss)
    return loss


def _estimator(run: Run, target: Target) -> Callable[[Any], Mapping[str, Any]]:
    """Return the estimate of a drafter on the validation prompts: replay on what the target writes, written once."""
    from drafttrain.eval.replay import expected_rounds, replay_rows

    wanted = run.recipe.eval
    texts, sampling = run.validation_texts
    tokens = sum(len(text.new) for text in texts)
    length = getattr(wanted.length, "depth", getattr(wanted.length, "num_draft_tokens", 5))
    lengths = sorted({*wanted.replay_lengths, length})

    def estimate(drafter: Any) -> dict[str, Any]:
        with drafter.standing_on(target):
            rows = replay_rows(target, drafter, texts, sampling, num_depths=max(lengths))
        by_length = {k: tokens / sum(expected_rounds(r, k) for r in rows) for k in lengths}
        alpha = sum(float(r.acceptance_T.sum()) for r in rows) / tokens
        said = "  ".join(f"K={k}: {value:.2f}" for k, value in by_length.items())
        return {
            "block_efficiency": by_length[length],
            "alpha": alpha,
            "said": f"block efficiency by replay {said}  alpha {alpha:.3f}",
        }

    return estimate


def _write_drafter(run: Run, drafter: Drafter, folder: Path, *, steps: int) -> None:
    """Write a drafter in memory as an exported folder."""
    if folder.exists():
        return
    weights = folder.with_name(f".{folder.name}.weights.part")
    with folder_beside(weights) as temporary:
        drafter.save(temporary)
    _calibrate(run, drafter, weights)
    _export_weights(run, weights, folder, steps=steps)
    shutil.rmtree(weights)


def _calibrate(run: Run, drafter: Drafter, folder: Path) -> None:
    """Write what the drafter fits on the validation texts into the folder of its weights."""
    from drafttrain.core.records import Record
    from drafttrain.data_gen.packing import pack
    from drafttrain.drafters import Drafter

    if type(drafter).calibrate is Drafter.calibrate:
        return
    texts, _ = run.validation_texts
    batches = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        records = [
            Record(text.id, [*text.prompt, *text.new], [False] * len(text.prompt) + [True] * len(text.new))
            for text in texts[start : start + TEXTS_AT_ONCE]
        ]
        batch, _ = pack(records, width=max(len(record.tokens) for record in records), weight_of_step=1.0)
        batches.append(batch.to(run.target.device))
    target = drafter.adapted(run.told_target)
    for name, content in drafter.to(run.target.device).calibrate(target, batches).items():
        write_json(folder / name, content)


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
        draft=recipe.drafter.draft,
    )
    export_hf(weights, folder, tokenizer=run.tokenizer, about=about, dtype=recipe.export.dtype)


def export_best(run: Run) -> dict[str, Any]:
    """Write the drafter folder from the best weights of the training; return what train.json holds."""
    from drafttrain.drafters import Drafter, drafters

    done = _training_result(run)
    trained = run.folder.train / done["drafter"]
    component = cast(Any, drafters.entry(run.recipe.drafter.kind).component)
    if component.calibrate is not Drafter.calibrate:
        _calibrate(run, component.load(trained, run.target), trained)
    _export_weights(run, trained, run.folder.drafter, steps=done["best_step"])
    return done


def _training_result(run: Run) -> dict[str, Any]:
    """Return what train.json holds; of a training that has not ended, the same of what it has so far."""
    folder = run.folder
    if folder.train_done.exists():
        done: dict[str, Any] = json.loads(folder.train_done.read_text(encoding="utf-8"))
        return done
    from drafttrain.train.callbacks import newest_checkpoint, weights_of_checkpoint

    best = folder.train / "best.json"
    if best.exists():
        figures = json.loads(best.read_text(encoding="utf-8"))
        step = figures.pop("step")
        by = "block_efficiency" if run.recipe.head is None else "log_likelihood"
        say(f"the training has not ended: its best step so far is exported, {step} of {run.recipe.train.max_steps}")
        return {"drafter": "best", "best_step": step, "last_step": step, "best_by": by, "best": None, "last": None}
    if run.recipe.head is not None:
        raise DrafttrainError(f"{folder.path}: the head has no validated step yet: drafttrain fit does all stages")
    newest = newest_checkpoint(folder.train / "checkpoints")
    if newest is None:
        raise DrafttrainError(f"{folder.path}: no checkpoint that can be read: drafttrain fit does all stages")
    step, weights = weights_of_checkpoint(newest)
    drafter = _start(run, training_data(run))
    missing = {name for name, p in drafter.named_parameters() if p.requires_grad} - weights.keys()
    if missing:
        raise CheckpointError(f"{newest}: lacks weights of this recipe's drafter: {', '.join(sorted(missing)[:5])}")
    drafter.load_state_dict(weights, strict=False)
    with folder_beside(folder.train / "last") as temporary:
        drafter.save(temporary)
    say(f"the training has not ended: {newest} is exported")
    return {"drafter": "last", "best_step": step, "last_step": step, "best_by": "", "best": None, "last": None}


def _export(run: Run) -> None:
    """Export the best weights, evaluate the files in a process of their own, write card and report, hold the gate."""
    from drafttrain.eval.evaluate import read_result
    from drafttrain.eval.gate import shortfalls
    from drafttrain.eval.report import write_report
    from drafttrain.eval.table import show
    from drafttrain.export.card import model_card
    from drafttrain.export.head import head_card

    recipe, folder = run.recipe, run.folder
    of_head = recipe.head is not None
    exported, rejected = (folder.head, folder.rejected_head) if of_head else (folder.drafter, folder.rejected)
    done = _training_result(run)
    before = read_result(folder.eval)
    if before is not None and (exported.exists() or rejected.exists()):
        say("export and evaluation: done before, skipped")
        result = before
        show(result)
    else:
        if of_head:
            export_trained_head(recipe, folder, run.target, trained=folder.train / done["drafter"])
        else:
            export_best(run)
        if not run.has_target():
            say(f"exported: {exported} (no target in this recipe, so nothing to evaluate it against)")
            return
        result = _evaluated_elsewhere(run)
    resolved, command = run.resolved, _command()
    best, last = done["best"], done["last"]
    if best is not None:
        say(
            f"exported: step {done['best_step']} ({done['best_by'].replace('_', ' ')} {best:.3f} on held-out data); "
            f"last step {done['last_step']} ({last:.3f})"
        )
    write_report(folder.report, result, title=recipe.name, metrics=folder.train / "metrics.csv", command=command)
    if exported.exists():
        # An export before this one was rejected; this one is judged now.
        shutil.rmtree(rejected, ignore_errors=True)
    short = shortfalls(result, recipe.export.require, drafter="drafter")
    comparisons = [] if of_head else _in_engines(run, exported if exported.exists() else rejected)
    short += [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    kept, other = (rejected, exported) if short else (exported, rejected)
    formats = [] if of_head else formats_of(recipe.export)
    if other.exists():
        os.replace(other, kept)
        for format in formats:
            shutil.rmtree(folder_as(kept, format), ignore_errors=True)
            os.replace(folder_as(other, format), folder_as(kept, format))
    if of_head:
        card = head_card(recipe.name, result, recipe=resolved, command=command)
    else:
        card = model_card(recipe.name, result, drafter="drafter", recipe=resolved, command=command)
    write_text(kept / "README.md", card)
    for format in formats:
        write_engine_card(folder_as(kept, format), kept, [o for o in comparisons if o["format"] == format])
    if comparisons:
        write_engine_card(kept, kept, comparisons)
    say(f"{'head:   ' if of_head else 'drafter:'} {kept}")
    say(f"report:  {folder.report}")
    if short:
        raise GateError(
            f"gate not met, the {'head' if of_head else 'drafter'} is in {kept}:\n"
            + "\n".join(f"  {line}" for line in short)
        )


def _in_engines(run: Run, source: Path) -> list[dict[str, Any]]:
    """Write the further formats of a run's drafter and let engines prove them; what was done before is kept."""
    settings, done = run.recipe.export, source / ENGINES
    formats = formats_of(settings)
    if formats and formats_are_current(source, formats, run.recipe.target) and (done.exists() or not settings.verify):
        say("further formats: done before, skipped")
        return json.loads(done.read_text(encoding="utf-8")) if settings.verify else []
    folders = write_formats(source, settings, run.recipe.target)
    dropped = dropped_prompts(run, run.recipe.eval.prompts)
    stand = Stand(run.recipe.target, run.recipe.eval, settings, dropped)
    return verified(source, folders, stand, run.target if settings.verify and run.placement == "replicated" else None)


def _evaluated_elsewhere(run: Run) -> dict[str, Any]:
    """Evaluate in a fresh process that has read nothing but the files, and never imports the trainer."""
    command = [sys.executable, "-m", "drafttrain.cli", "eval", str(run.folder.path)]
    environment = without_launcher(os.environ)
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


def _evaluated_head(run: Run) -> dict[str, Any]:
    """Evaluate the frozen drafter with what the run's head decides, and the head on held-out draft tokens."""
    from drafttrain.target.frozen import resolve_folder

    settings = with_own_head(run.recipe.eval, exported_head(run.folder))
    folders = {"drafter": resolve_folder(run.recipe.head.drafter)}
    result = _evaluated(folders, run.target, settings, dropped=dropped_prompts(run, run.recipe.eval.prompts))
    return result | {"head": figures_of_head(run.recipe, run.folder)}


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
    _check_lengths(target, prompts, settings)
    result = evaluate(folders, target, prompts, replace(settings, num_prompts=None))
    return result | {"prompts_dropped_for_overlap": len(dropped)}


def _check_lengths(target: Target, prompts: Sequence[Prompt], settings: EvalSettings) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    target.check_length(
        longest + settings.max_new_tokens, what=f"the longest prompt ({longest} tokens) and eval.max_new_tokens"
    )


def _command() -> str:
    return " ".join(["drafttrain", *sys.argv[1:]])


def _quiet_libraries() -> None:
    """Silence bars and hints of transformers; our own lines say what a user needs."""
    import torch
    import transformers

    # DeepSpeed, which Lightning imports, would otherwise warn that it had to look for a device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
