"""`drafttrain calibrate --own`: a nested drafter gets thresholds for a second target, and keeps those of the first."""

from __future__ import annotations

import json
import re
from pathlib import Path

from drafttrain.checkpoint import read_drafter
from drafttrain.drafters.sorted_lm.module import FILE
from drafttrain.target_model import Target, TargetSettings
from tests.cli.test_cli import call
from tests.conftest import byte_tokenizer, random_llama
from tests.export import folders

SMALL = ("eval.num_prompts=3", "eval.max_new_tokens=24", "eval.prompt_tokens=8", "target.dtype=float32")


def second_target(folder: Path, *, like: Path) -> Path:
    """Write another target of the same sizes."""
    random_llama(seed=9).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == (like / "config.json").read_bytes()
    return folder


def test_a_second_target_gets_its_own_thresholds(tiny_target: Target, tiny_folder: Path, tmp_path: Path) -> None:
    made = folders.drafter_of("sorted_lm", tiny_target)
    made.thresholds = {tiny_target.fingerprint: [0.25, 0.5]}
    folder = folders.save(made, tmp_path / "drafter", tiny_target)
    other = second_target(tmp_path / "other", like=tiny_folder)
    second = Target.load(TargetSettings(model=str(other), dtype="float32"))
    assert read_drafter(folder, second).thresholds_for(second) == [0.25, 0.5], "control: those of the first target"
    call("calibrate", str(folder), "--own", "--target", str(other), "--temperature", "0", *SMALL)
    held = json.loads((folder / FILE).read_text())["thresholds"]
    assert list(held) == [tiny_target.fingerprint, second.fingerprint]
    assert held[tiny_target.fingerprint] == [0.25, 0.5]
    read = read_drafter(folder, second)
    assert list(read.thresholds_for(second)) == held[second.fingerprint] != [0.25, 0.5]
    assert read.thresholds_for(tiny_target) == [0.25, 0.5]


def test_texts_count_up_to_their_first_repetition(tiny_target: Target, tiny_folder: Path, tmp_path: Path) -> None:
    folder = folders.save(folders.drafter_of("sorted_lm", tiny_target), tmp_path / "drafter", tiny_target)
    arguments = ("calibrate", str(folder), "--own", "--target", str(tiny_folder), "--temperature", "0", *SMALL)
    estimates = [
        re.findall(r"estimated (\S+) tokens", "".join(call(*arguments, f"eval.repetition_ngram={ngram}")))
        for ngram in (0, 1)
    ]
    assert len(estimates[0]) == len(estimates[1]) == 1
    assert estimates[0] != estimates[1]


def test_what_cannot_be_calibrated_for_a_target_is_refused(
    tiny_target: Target, tiny_folder: Path, tmp_path: Path
) -> None:
    plain = folders.save(folders.drafter_of("causal_lm", tiny_target), tmp_path / "plain", tiny_target)
    given = folders.drafter_of("sorted_lm", tiny_target, thresholds=[0.1, 0.2])
    given = folders.save(given, tmp_path / "given", tiny_target)
    target = ("--target", str(tiny_folder), *SMALL)
    for words, code, message in (
        ((str(plain), *target), 1, "a drafter of kind causal_lm chooses nothing for a target after training"),
        ((str(given), *target), 1, "was given in its recipe, and stays"),
        ((str(given), "eval.prompts=builtin:test"), 2, "it reads eval.validation_prompts"),
        (("builtin:drafter",), 2, "writes into the drafter's folder"),
        ((str(given), "--out", "x", "--method", "platt"), 2, "--out and --method belong to the map of a confidence"),
    ):
        _, error = call("calibrate", "--own", *words, code=code)
        assert message in " ".join(error.split())
