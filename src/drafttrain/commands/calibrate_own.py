"""drafttrain calibrate --own: choose for a further target what training chose for its own: exits' thresholds, a tree, temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of
from drafttrain.config.load import load_sections
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters import Drafter
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.repetition import tokens_before_repetition
from drafttrain.eval.replay import Text
from drafttrain.export.drafter import CalibrationTexts, calibrated
from drafttrain.pipeline.evaluating import check_lengths
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target


def calibrate_own(drafter: str, target: str | None, overrides: Sequence[str], *, temperature: float) -> list[Path]:
    """Calibrate a drafter on texts that a target writes after `eval.validation_prompts`; return the written files.

    As at the end of training, a text counts up to where it begins to repeat itself (`eval.repetition_ngram`).

    Args:
        drafter: A local folder or a run folder: the files are written into it.
        target: None: the drafter's own.
        overrides: Overrides of the sections target and eval.
        temperature: Of the texts.

    Raises:
        RecipeError: The drafter is not local, or an override is wrong.
        CheckpointError: Its kind calibrates nothing, or its recipe gave what it would.
    """
    quiet_libraries()
    of_target, settings = load_sections(["target", "eval"], overrides)
    if any(one.startswith("eval.prompts=") for one in overrides):
        raise RecipeError("arguments", ["--own: it reads eval.validation_prompts: give those in place of eval.prompts"])
    if not Path(drafter).is_dir():
        raise RecipeError(
            "arguments", [f"--own: writes into the drafter's folder: copy {drafter} into one, and name it"]
        )
    folder = folders_of([drafter])[0]
    of_target = evaluated_on(of_target, folder, named=drafter, target=target, overrides=overrides)
    check_drafters(of_target, [str(folder)])
    loaded = Target.load(of_target)
    read = read_drafter(folder, loaded)
    if type(read).calibrate is Drafter.calibrate:
        raise CheckpointError(
            f"{drafter}: --own: a drafter of kind {read.kind} chooses nothing for a target after training"
        )
    prompts = read_prompts(
        settings.validation_prompts, loaded.tokenizer, prompt_tokens=settings.prompt_tokens, limit=settings.num_prompts
    )
    sampling = Sampling() if temperature == 0 else Sampling(temperature, settings.top_p, settings.top_k)
    tasks = [Task(prompt.id, list(prompt.tokens), sampling) for prompt in prompts]
    check_lengths(loaded, prompts, settings)
    written = continuations(tasks, loaded, max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    if ngram := settings.repetition_ngram:
        written = [new[: max(1, tokens_before_repetition(new, ngram=ngram))] for new in written]
    texts = [Text(task.id, task.prompt, new) for task, new in zip(tasks, written, strict=True)]
    files = calibrated(read, CalibrationTexts(texts, loaded))
    if not files:
        raise CheckpointError(f"{drafter}: --own: what it would choose was given in its recipe, and stays")
    for name, content in files.items():
        write_json(folder / name, content)
    say(f"written: {', '.join(str(folder / name) for name in files)}")
    return [folder / name for name in files]
