"""`vllm serve` with the embedded target on a free port of loopback, as a context manager."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from drafttrain.environments.environment import python_of
from drafttrain.environments.known import VLLM_CPU
from drafttrain.target_model.folders import resolve_folder

TARGET = "builtin:target"
START_SECONDS = 240.0


@contextmanager
def vllm_server(log: Path, options: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the base URL of a server that writes its output into `log`.

    Args:
        options: Besides those that make it small.
        environ: What its environment has besides this one's.
    """
    # Held until the end, and shared with the server only: nobody else is given it meanwhile.
    held = socket.socket()
    for shared in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, shared, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    # The build for CPUs has no working `vllm` command.
    python = str(python_of(VLLM_CPU))
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_folder(TARGET))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", "8"]
    command += ["--max-model-len", "128", "--enforce-eager", *options]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with log.open("wb") as written:
        # A session of its own: the engine is a process below the server, and must go with it.
        process = subprocess.Popen(
            command, stdout=written, stderr=written, env=own | settings | dict(environ or {}), start_new_session=True
        )
    try:
        began = time.monotonic()
        while not _answers(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - began < START_SECONDS, log.read_text()[-4000:]
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        held.close()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False
