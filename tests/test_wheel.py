"""The wheel: what `pip install .` gives holds the recipes, the embedded models and the prompts."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from drafttrain.config.bundled import bundled_recipes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that was built from the files of this checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="the build backend, which is not fetched here")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "recipes"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(built), str(source)], check=True, capture_output=True, text=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "installed")
    return built / "installed"


@pytest.mark.long
def test_a_wheel_brings_the_recipes(installed: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import drafttrain\n"
        "assert drafttrain.__file__.startswith(sys.argv[1])\n"
        "from drafttrain.config.bundled import bundled_recipes, copy_recipe, find_recipe\n"
        "print(find_recipe('demo').read_text(encoding='utf-8'), end='')\n"
        "print(*[recipe.name for recipe in bundled_recipes()])\n"
    )
    run = [sys.executable, "-c", code, str(installed)]
    *text, names = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines(keepends=True)
    assert names.split() == [recipe.name for recipe in bundled_recipes()]
    assert "".join(text) == (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")


def test_a_wheel_brings_every_file_that_the_package_reads(installed: Path) -> None:
    package = ROOT / "src" / "drafttrain"
    wanted = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(wanted) > 100
    assert not [str(path) for path in wanted if not (installed / "drafttrain" / path).is_file()]
