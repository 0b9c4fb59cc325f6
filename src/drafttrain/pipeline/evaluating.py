"""Evaluation of exported files, in a process of its own that has read nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.core.texts import Prompt
from drafttrain.distributed.world import without_launcher
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.later_turns import most_prompt_tokens
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Input, Result, read_result
from drafttrain.eval.settings import EvalSettings
from drafttrain.pipeline.inputs import Inputs
from drafttrain.pipeline.run import Run
from drafttrain.target_model import Target


def evaluate_in_new_process(run: Run) -> Result:
    """Evaluate in a new process, which reads only the exported files and never imports the trainer."""
    command = [sys.executable, "-m", "drafttrain", "eval", str(run.folder.path)]
    # A plugin that this process can import, the new one can import too.
    environment = without_launcher(os.environ) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
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
    return read_result(run.folder.eval)


def evaluate_folders(
    folders: Mapping[str, Path],
    target: Target,
    settings: Any,
    *,
    dropped: Sequence[str],
    unfinished: Path | None = None,
    answers: Path | None = None,
) -> Result:
    """Evaluate drafter folders on the prompts of the settings, without the contaminated ones.

    Args:
        unfinished: Folder in which outputs are stored until the evaluation has ended.
        answers: Folder for the answers as Spec-Bench's files; None: they are not written.
    """
    prompts = read_prompts(
        settings.prompts,
        target.tokenizer,
        prompt_tokens=settings.prompt_tokens,
        images=target.images,
        dropped=dropped,
        limit=settings.num_prompts,
    )
    check_lengths(target, prompts, settings)
    result = evaluate(
        folders, target, prompts, replace(settings, num_prompts=None), unfinished=unfinished, answers=answers
    )
    return replace(result, prompts_dropped_for_overlap=len(dropped))


def with_inputs(result: Result, inputs: Inputs) -> Result:
    """Return a result with the paths that it read and their digests."""
    return replace(result, inputs={key: Input(**one) for key, one in inputs.items()})


def check_lengths(target: Target, prompts: Sequence[Prompt], settings: EvalSettings) -> None:
    """Refuse prompts that with eval.max_new_tokens exceed the positions of the target."""
    new = settings.max_new_tokens
    longest = max(most_prompt_tokens(prompt, target, max_new_tokens=new) for prompt in prompts)
    target.check_length(longest + new, what=f"the longest prompt ({longest} tokens) and eval.max_new_tokens")
