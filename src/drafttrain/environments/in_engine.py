"""Run a worker in an engine's environment: `python in_engine.py WORKER REQUEST ANSWER`. Knows nothing of drafttrain.

REQUEST and ANSWER are JSON files. The worker is a Python file with a function `answer_to(request)`; what it raises is its answer too.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Read a request, write its answer."""
    worker, request, answer = (Path(word) for word in sys.argv[1:])
    asked = json.loads(request.read_text(encoding="utf-8"))
    try:
        spec = importlib.util.spec_from_file_location(worker.stem, worker)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[worker.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        said = module.answer_to(asked)
    except Exception as error:  # whatever the engine raises is its answer
        traceback.print_exc()
        said = {"error": f"{type(error).__name__}: {error}"}
    answer.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
