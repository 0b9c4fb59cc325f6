"""The scripts under examples/ run as they are, and the Python API that they use is what the package promises."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import drafttrain
from drafttrain.losses import losses

EXAMPLES = Path(__file__).parents[1] / "examples"


class Example:
    """A script that is run in this process, in a folder, with words on its command line."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, printed: pytest.CaptureFixture[str]) -> None:
        self._patch, self._printed = patch, printed
        patch.chdir(folder)
        # As Python does for a script.
        patch.syspath_prepend(EXAMPLES)

    def run(self, name: str, *words: str) -> str:
        """Run a script; return what it prints on stdout."""
        self._patch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return self._printed.readouterr().out


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], evaluated_here: None
) -> Iterator[Example]:
    yield Example(tmp_path, monkeypatch, capsys)
    sys.modules.pop("hellinger_loss", None)
    losses._entries.pop("hellinger", None)


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "compare_drafters.py",
        "hellinger_loss.py",
        "own_proposer.py",
        "train_with_own_loss.py",
    }


def test_two_drafters_are_compared(example):
    stdout = example.run("compare_drafters.py", "--num-prompts", "2", "--max-new-tokens", "8")
    assert "block efficiency" in stdout
    assert stdout.count("  B  ") >= 2


@pytest.mark.long
def test_a_loss_of_the_script_trains_a_drafter_that_is_exported(example, tmp_path):
    stdout = example.run("train_with_own_loss.py", "--smoke", "--folder", "run")
    assert "exported: run/drafter" in stdout
    assert (tmp_path / "run" / "drafter" / "model.safetensors").is_file()
    assert "hellinger" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_proposer_of_the_script_changes_no_text(example):
    assert "text unchanged" in example.run("own_proposer.py", "--num-prompts", "4")


def test_the_package_promises_five_functions():
    assert sorted(set(drafttrain.__all__) - {"__version__"}) == [
        "cascade",
        "evaluate",
        "load_drafter",
        "load_target",
        "train",
    ]
    assert all(callable(getattr(drafttrain, name)) for name in drafttrain.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = drafttrain.fit
