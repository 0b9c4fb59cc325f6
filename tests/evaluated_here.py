"""The evaluation that ends a `fit`, in the process of the test: the imports of another one take longer than what it does."""

from __future__ import annotations

import io
from typing import Any

import pytest

from drafttrain.commands.evaluate import evaluate_recipe
from drafttrain.config.load import load_recipe
from drafttrain.eval import page
from drafttrain.eval.result import Result, read_result
from drafttrain.pipeline import judging
from drafttrain.pipeline.run import Run


def evaluate_here(patch: pytest.MonkeyPatch) -> None:
    """Let `fit` evaluate in this process, by the command that it starts another one for.

    The pictures of its report are composed and not rendered: `tests/eval/test_report.py` renders and reads them.
    That the other one loads no trainer, and what it costs, is left to `test_fit_goes_all_the_way_and_a_second_time_does_nothing`.
    """

    def evaluated(run: Run) -> Result:
        evaluate_recipe(load_recipe(run.folder.path), run.folder.path)
        return read_result(run.folder.eval)

    def saved(figure: Any, to: Any, **how: Any) -> None:
        if isinstance(to, io.BytesIO):
            to.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
        else:
            figure.savefig(to, **how)

    patch.setattr(page, "_save", saved)
    patch.setattr(judging, "evaluate_in_new_process", evaluated)
