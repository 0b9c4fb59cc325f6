"""Our statements about engines, checked in the source of the named releases. Needs vLLM's environment: make test-serving."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafttrain.environments.environment import check_installed, folder_of
from drafttrain.environments.known import VLLM_CPU
from drafttrain.export import sglang
from drafttrain.importers.eagle3 import VARIANTS

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def sglang_models(tmp_path_factory) -> Path:
    """The folder of SGLang's models, of the wheel of the release that our refusals were read in."""
    folder = tmp_path_factory.mktemp("sglang")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, f"sglang=={sglang.READ_IN}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no wheel of sglang {sglang.READ_IN}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("llama_eagle.py", "llama_eagle3.py"):
            archive.extract(f"sglang/srt/models/{name}", folder)
    return folder / "sglang" / "srt" / "models"


@pytest.fixture(scope="module")
def vllm_models() -> Path:
    """The folder of vLLM's models, in its environment."""
    check_installed(VLLM_CPU)
    (folder,) = folder_of(VLLM_CPU).glob("lib/python*/site-packages/vllm/model_executor/models")
    return folder


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    """Yield the calls of a name, by its last part, in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
            yield node


def fields_read(path: Path) -> set[str]:
    """Return the fields of a configuration that a file reads by name."""
    asked = [(call.args[1] if len(call.args) > 1 else None) for call in calls(path, "getattr")]
    asked += [call.args[0] for call in calls(path, "get") if call.args]
    return {node.value for node in asked if isinstance(node, ast.Constant)}


def fc_biases(path: Path) -> list[str | None]:
    """Return the argument `bias` of each `fc` in a file; None: it has none."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "self.fc"
            and isinstance(node.value, ast.Call)
        ):
            given = {word.arg: ast.unparse(word.value) for word in node.value.keywords}
            found.append(given.get("bias"))
    return found


def test_sglang_reads_every_variant_of_eagle3_but_those_that_are_refused(sglang_models):
    read = fields_read(sglang_models / "llama_eagle3.py")
    assert set(VARIANTS) - read == set(sglang.IGNORED)
    assert "eagle_aux_hidden_state_layer_ids" in read


def test_sglang_has_a_bias_in_the_fc_of_eagle(sglang_models):
    """torch's Linear has a bias by default."""
    assert fc_biases(sglang_models / "llama_eagle.py") == [None]


def test_vllm_reads_every_variant_of_eagle3(vllm_models):
    assert set(VARIANTS) <= fields_read(vllm_models / "llama_eagle3.py")


def test_vllm_has_no_bias_in_the_fc_of_eagle(vllm_models):
    assert fc_biases(vllm_models / "llama_eagle.py") == ["False"]


def test_vllm_reads_the_window_of_layer_types_only(vllm_models):
    read = fields_read(vllm_models / "llama.py")
    assert "layer_types" in read
    assert not {"use_sliding_window", "max_window_layers"} & read
