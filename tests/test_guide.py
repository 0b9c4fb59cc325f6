"""docs/adding_a_drafter.md, followed word for word: its files are written, its commands run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.foreign import read_json
from drafttrain.drafters import drafters

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_drafter.md"
BLOCKS = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M))
FILES = [name for name in BLOCKS if name != "commands"]
SMALL = [
    "train.max_steps=8",
    "train.warmup_steps=2",
    "eval.num_prompts=2",
    "eval.max_new_tokens=12",
    "eval.temperatures=[0]",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the page with its files, as the current folder and on the path of imports."""
    for name in FILES:
        (tmp_path / name).write_text(BLOCKS[name], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_bigram", None)
    drafters._entries.pop("bigram", None)


def run(line: str) -> None:
    """Run a command of the page in this process; what the page runs in full is run with `--smoke` alone."""
    program, *words = shlex.split(line.replace("runs/bigram", "runs/bigram-smoke"))
    if program == "python":
        assert words[:2] == ["-m", "pytest"]
        assert pytest.main(["-q", "-p", "no:cacheprovider", *words[2:]]) == 0
    elif words[0] != "fit" or "--smoke" in words:
        assert program == "drafttrain"
        result = CliRunner().invoke(app, words + (SMALL if words[0] == "fit" else []))
        assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.long
@pytest.mark.usefixtures("evaluated_here")
def test_the_page_builds_a_drafter_that_trains_decodes_and_is_exported(folder: Path):
    for line in BLOCKS["commands"].splitlines():
        run(line)
    drafter = folder / "runs" / "bigram-smoke" / "drafter"
    assert {"config.json", "model.safetensors", "drafttrain.json"} <= {path.name for path in drafter.iterdir()}
    result = read_json(drafter.parent / "eval.json")
    assert result["drafters"]["drafter"]["kind"] == "bigram"
    assert result["settings"]["length"]["num_draft_tokens"] == 2
    parity = result["temperatures"][0]["drafters"]["drafter"]["parity"]
    assert parity["exact"]
