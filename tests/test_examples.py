"""The scripts under examples/ run as they are, and the Python API that they use is what the package promises."""

import subprocess
import sys
from pathlib import Path

import pytest

import drafttrain

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words: str, folder: Path) -> str:
    """Run a script in a folder; return what it prints on stdout."""
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "compare_drafters.py",
        "hellinger_loss.py",
        "own_proposer.py",
        "train_with_own_loss.py",
    }


def test_two_drafters_are_compared(tmp_path):
    stdout = run("compare_drafters.py", "--num-prompts", "3", "--max-new-tokens", "12", folder=tmp_path)
    assert "block efficiency" in stdout
    assert stdout.count("  B  ") >= 2


def test_a_loss_of_the_script_trains_a_drafter_that_is_exported(tmp_path):
    stdout = run("train_with_own_loss.py", "--smoke", "--folder", "run", folder=tmp_path)
    assert "exported: run/drafter" in stdout
    assert (tmp_path / "run" / "drafter" / "model.safetensors").is_file()
    assert "hellinger" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_proposer_of_the_script_changes_no_text(tmp_path):
    assert "text unchanged" in run("own_proposer.py", "--num-prompts", "4", folder=tmp_path)


def test_the_package_promises_four_functions():
    assert sorted(set(drafttrain.__all__) - {"__version__"}) == ["evaluate", "load_drafter", "load_target", "train"]
    assert all(callable(getattr(drafttrain, name)) for name in drafttrain.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = drafttrain.fit
