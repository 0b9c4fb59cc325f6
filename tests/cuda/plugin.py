"""The pytest plugin that pretends CUDA: `python -m pytest -p tests.cuda.plugin`. It must be imported before torch is."""

from __future__ import annotations

import os

from tests.cuda import preload

reason = ""
"""Why CUDA is not pretended; empty: it is."""

try:
    preload.load()
except preload.NotPossible as error:
    reason = str(error)
else:
    # DeepSpeed would look for a toolkit where it finds CUDA.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
