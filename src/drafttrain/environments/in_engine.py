"""Run a worker in an environment: `python in_engine.py WORKER REQUEST ANSWER`. Does not import drafttrain.

REQUEST and ANSWER are JSON files. The worker is a Python file with a function `answer_to(request)`. If it raises, the answer is
`{"error": ...}`.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Read a request, run the worker, write its answer."""
    worker, request, answer = (Path(word) for word in sys.argv[1:])
    asked = json.loads(request.read_text(encoding="utf-8"))
    try:
        spec = importlib.util.spec_from_file_location(worker.stem, worker)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[worker.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        result = module.answer_to(asked)
    except Exception as error:  # an engine may raise anything; the parent reports it
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    answer.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
