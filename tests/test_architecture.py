"""The structure: imports go one way without circles, heavy ones stay where they are used, files are short."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import drafttrain

ROOT = Path(drafttrain.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# A room may import the rooms in the lines above its own.
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
training recorder
online
config
pipeline
commands
api cli
__main__
"""
RANK = {room: rank for rank, rooms in enumerate(ORDER.split("\n")) for room in rooms.split()}

TRAIN_ONLY = {"lightning", "pytorch_lightning", "lightning_fabric", "deepspeed"}
HTTP = {"fastapi", "starlette", "uvicorn", "flask", "aiohttp", "httpx", "requests", "http", "socketserver", "urllib3"}
# A server may write training texts, and an engine's worker asks the server that it starts. The recorder parses HTTP itself.
HTTP_CLIENTS = {"data_gen/openai_client.py": "aiohttp", "serving/engines/llama_cpp_worker.py": "http.client"}

MOST_INNER_IMPORTS = 25
MOST_LINES = 400


@functools.cache
def imported(module: Path) -> tuple[tuple[str, int], ...]:
    """Return every module name that a file imports, wherever in it, with the line."""
    return tuple(_imported(module))


def _imported(module: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "drafttrain" else []
            yield from ((name, node.lineno) for name in names or [str(node.module)])
        elif isinstance(node, ast.Call) and name_of(node.func) == "import_module":
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def name_of(function: ast.expr) -> str:
    """Return the last part of what is called: `import_module` of `importlib.import_module`."""
    return getattr(function, "attr", getattr(function, "id", ""))


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
    module.write_text("def f():\n    from drafttrain import pipeline\n    import drafttrain.training.run\n")
    assert [wrong_direction("eval", name) for name, _ in imported(module)] == [True, True]
    assert not wrong_direction("eval", "drafttrain.core.batches")
    assert wrong_direction("losses", "drafttrain.target_model.target")


def test_lightning_and_deepspeed_are_imported_in_training_only():
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        for name, line in imported(module)
        if name.split(".")[0] in TRAIN_ONLY and room_of(module) != "training"
    ]
    assert not wrong, "\n".join(wrong)
    settings = {name.split(".")[0] for name, _ in imported(ROOT / "training" / "settings.py")}
    assert not settings & TRAIN_ONLY


def test_http_libraries_are_imported_only_where_a_server_is_asked():
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in MODULES
        for name, line in imported(module)
        if (name.split(".")[0] in HTTP or name.startswith("urllib.request"))
        and module.relative_to(ROOT).as_posix() not in HTTP_CLIENTS
    ]
    assert not wrong, "\n".join(wrong)
    assert all(client in {name for name, _ in imported(ROOT / module)} for module, client in HTTP_CLIENTS.items())


def module_name(path: Path) -> str:
    return ".".join(("drafttrain", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def own_imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """Yield every module of ours that a tree imports, whether it names the module or something inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "drafttrain":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else str(node.module)), node


def without_type_checking(tree: ast.Module) -> ast.Module:
    """Return a module without the imports that only a type checker reads."""
    return ast.Module(
        [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))], []
    )


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which modules each module imports, wherever in it; a package is imported with what is in it."""
    known = set(sources)
    trees = {name: without_type_checking(ast.parse(text)) for name, text in sources.items()}
    # The package itself imports nothing before its API is used.
    return {
        name: {other for other, _ in own_imports(tree, known)} - {name, "drafttrain"} for name, tree in trees.items()
    }


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import circle, or nothing."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_no_import_circle_is_left():
    circle = circle_in(graph_of({module_name(path): path.read_text(encoding="utf-8") for path in MODULES}))
    assert not circle, " -> ".join(circle)


def test_control_a_circle_through_a_function_is_found():
    sources = {"drafttrain.a": "import drafttrain.b\n", "drafttrain.b": "def f():\n    import drafttrain.a\n"}
    assert circle_in(graph_of(sources)) == ["drafttrain.a", "drafttrain.b", "drafttrain.a"]


def test_few_modules_of_ours_are_imported_inside_functions():
    """Such an import hides what a file needs: it is for the command line alone, and for the heavy trainer."""
    known = {module_name(path) for path in MODULES}
    inside: set[str] = set()
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if not re.search(r"^\s+(from|import) drafttrain", text, re.MULTILINE):
            continue
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                inside |= {f"{path.relative_to(ROOT)}:{node.lineno}" for _, node in own_imports(function, known)}
    assert len(inside) <= MOST_INNER_IMPORTS, "\n".join(sorted(inside))


def test_files_are_short():
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES}


def test_the_package_itself_imports_its_api_only_when_it_is_asked_for():
    tree = without_type_checking(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")))
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) and node.module != "typing"]


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


def run(code: str) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
