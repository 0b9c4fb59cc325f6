"""Which target the commands take for a drafter, and which prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.commands.chat import open_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of
from drafttrain.commands.named_prompts import prompts_named_twice
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.target_model import TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.cli.test_cli import call

DRAFTER = "builtin:drafter"


@pytest.mark.parametrize("command", ["eval", "calibrate", "advise", "long-prompt"])
def test_the_target_of_an_override_counts_as_that_of_the_option(command: str, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    errors = [call(command, DRAFTER, *words, code=2)[1] for words in ([f"target.model={absent}"], ["--target", absent])]
    assert errors[0] == errors[1]
    assert "absent: no such folder" in errors[0].replace("\n", "")


def test_a_chat_takes_the_target_of_an_override(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="absent: no such folder"):
        open_drafter(DRAFTER, None, [f"target.model={tmp_path / 'absent'}"])


def test_the_targets_in_their_order(tmp_path: Path) -> None:
    def chosen(target: str | None, *overrides: str, drafter: str = DRAFTER) -> str | None:
        given = TargetSettings(model=overrides[0].partition("=")[2]) if overrides else TargetSettings()
        folder = resolve_folder(drafter)
        return evaluated_on(given, folder, named=drafter, target=target, overrides=overrides).model

    assert chosen("a", "target.model=b") == "a"
    assert chosen(None, "target.model=b") == "b"
    assert chosen(None) == TargetSettings().model, "it was trained without a target"
    assert chosen(None, drafter="builtin:smollm2_eagle3") == "known:smollm2"
    assert chosen(None, "target.model=b", drafter="builtin:smollm2_eagle3") == "b"
    with pytest.raises(CheckpointError, match=r"mine: no target is named in it\. Give --target MODEL"):
        evaluated_on(TargetSettings(), tmp_path, named="mine", target=None, overrides=[])


def test_prompts_are_named_once() -> None:
    twice = ["--prompts and eval.prompts both name prompts: remove one"]
    assert prompts_named_twice("a", ["eval.prompts=b"]) == twice
    assert prompts_named_twice("a", ["eval.prompt_tokens=3"]) == prompts_named_twice(None, ["eval.prompts=b"]) == []


def test_a_run_stands_for_the_drafter_that_it_exported(tmp_path: Path) -> None:
    drafter = resolve_folder(DRAFTER)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "drafter").symlink_to(drafter)
    (tmp_path / "empty").mkdir()
    assert folders_of([str(tmp_path / "run"), str(drafter)]) == [tmp_path / "run" / "drafter", drafter]
    with pytest.raises(RecipeError, match="neither a drafter folder nor a run with an exported drafter"):
        folders_of([DRAFTER, str(tmp_path / "empty")])
