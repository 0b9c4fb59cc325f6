"""The walls of the house: imports go one way, heavy ones stay where they are used, and a quick import is quick."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import drafttrain

ROOT = Path(drafttrain.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# A room may import the rooms of the lines above its own.
ORDER = """
core
distributed
losses target_model
drafters
heads
checkpoint
environments
data_gen
eval
export
importers serving
train recorder
online
config
pipeline
commands
cli
__main__
"""
RANK = {room: rank for rank, rooms in enumerate(ORDER.split("\n")) for room in rooms.split()}

TRAIN_ONLY = {"lightning", "pytorch_lightning", "lightning_fabric", "deepspeed"}
HTTP = {"fastapi", "starlette", "uvicorn", "flask", "aiohttp", "httpx", "requests", "http", "socketserver", "urllib3"}
# Besides the room online: texts may be written by a server that serves the target, and an engine's worker asks the server that it starts.
HTTP_CLIENTS = {"data_gen/openai_client.py": "aiohttp", "serving/engines/llama_cpp_worker.py": "http.client"}


def imported(module: Path) -> Iterator[tuple[str, int]]:
    """Yield every module name that a file imports, wherever in it, with the line."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "drafttrain" else []
            yield from ((name, node.lineno) for name in names or [str(node.module)])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def room_of(module: Path) -> str:
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def wrong_direction(room: str, name: str) -> bool:
    """Tell whether a module of `room` must not import `name`."""
    if not name.startswith("drafttrain."):
        return False
    other = name.split(".")[1]
    return other in RANK and other != room and RANK[other] >= RANK[room]


def test_every_module_is_in_a_room():
    rooms = {room_of(module) for module in MODULES} - {"__init__"}
    assert rooms <= set(RANK)


def test_imports_go_one_way():
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        if room_of(module) != "__init__"
        for name, line in imported(module)
        if wrong_direction(room_of(module), name)
    ]
    assert not wrong, "\n".join(wrong)


def test_an_import_to_the_right_is_noticed(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from drafttrain import pipeline\n    import drafttrain.train.run\n")
    assert [wrong_direction("eval", name) for name, _ in imported(module)] == [True, True]
    assert not wrong_direction("eval", "drafttrain.core.batches")
    assert wrong_direction("losses", "drafttrain.target_model.target")


def test_lightning_and_deepspeed_are_imported_in_train_only():
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        for name, line in imported(module)
        if name.split(".")[0] in TRAIN_ONLY and room_of(module) != "train"
    ]
    assert not wrong, "\n".join(wrong)
    settings = {name.split(".")[0] for name, _ in imported(ROOT / "train" / "settings.py")}
    assert not settings & TRAIN_ONLY


def test_http_is_spoken_online_and_where_a_server_is_asked_for_texts():
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        for name, line in imported(module)
        if (name.split(".")[0] in HTTP or name.startswith("urllib.request"))
        and room_of(module) != "online"
        and module.relative_to(ROOT).as_posix() not in HTTP_CLIENTS
    ]
    assert not wrong, "\n".join(wrong)
    assert all(client in {name for name, _ in imported(ROOT / module)} for module, client in HTTP_CLIENTS.items())


def test_the_package_itself_imports_nothing():
    assert not list(imported(ROOT / "__init__.py"))


@pytest.mark.parametrize("module", ["drafttrain", "drafttrain.cli", "drafttrain.config.bundled"])
def test_a_quick_import_brings_no_torch(module):
    run(
        f"""
        import sys, {module}
        heavy = {{"torch", "transformers", "lightning", "deepspeed", "datasets", "omegaconf"}} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_import_drafttrain_takes_less_than_a_fifth_of_a_second_of_processor_time():
    code = "import time; t = time.process_time(); import drafttrain; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.2


def test_recipes_evaluation_and_export_need_neither_lightning_nor_deepspeed():
    run(
        f"""
        import importlib, pkgutil, sys

        class Without:
            "A finder that does not see what is not installed here."
            def __init__(self, finder): self.finder = finder
            def __getattr__(self, name): return getattr(self.finder, name)
            def find_spec(self, name, path=None, target=None):
                hidden = name.split(".")[0] in {TRAIN_ONLY!r}
                return None if hidden else self.finder.find_spec(name, path, target)

        sys.meta_path = [Without(finder) for finder in sys.meta_path]
        try:
            import lightning
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("lightning can be imported: nothing is proven")

        import drafttrain.config.load, drafttrain.config.schema, drafttrain.eval, drafttrain.export, drafttrain.importers
        for room in (drafttrain.eval, drafttrain.export, drafttrain.importers, drafttrain.config):
            for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
                importlib.import_module(module.name)
        drafttrain.config.schema.recipe_schema()  # scans every registry
        assert not {TRAIN_ONLY!r} & {{name.split(".")[0] for name in sys.modules}}
        """
    )


def run(code: str) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
