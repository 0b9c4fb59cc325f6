"""Run a worker in an environment. Does not import drafttrain.

    python in_engine.py WORKER REQUEST ANSWER    # one request
    python in_engine.py WORKER REQUEST           # a conversation

REQUEST and ANSWER are JSON files, and the worker is a Python file. For one request it has a function `answer_to(request)`. For a
conversation it has `start(request)`, which returns the function from a request to its answer: each line on standard input is a
request, each line on standard output its answer; the first line says that the worker has started. If the worker raises, the answer
is `{"error": ...}`.
"""

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a request, run the worker, write its answer."""
    worker, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if sys.argv[3:]:
        answer = _tried(lambda: _loaded(worker).answer_to(request))
        Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
    else:
        _converse(worker, request)


def _converse(worker: Path, request: dict[str, Any]) -> None:
    # Libraries print to standard output: their lines go to the log, as those of standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    started: list[Callable[[dict[str, Any]], dict[str, Any]]] = []

    def start() -> dict[str, Any]:
        started.append(_loaded(worker).start(request))
        return {}

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say(_tried(start))
    while started and (line := sys.stdin.readline()):
        say(_tried(started[0], json.loads(line)))


def _tried(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return function(*given)
    except Exception as error:  # an engine may raise anything; the parent reports it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _loaded(worker: Path) -> Any:
    spec = importlib.util.spec_from_file_location(worker.stem, worker)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[worker.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
