"""What the smollm2 benchmarks of a target share: their common options, the loaded target, and the CPU seconds of a call."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from drafttrain.target_model import Target, TargetSettings


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every such benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--target", required=True, help="Folder of the target.")
    made.add_argument("--prompts", default="builtin:test", help="JSON lines.")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--threads", type=int, default=1)
    return made


def loaded(arguments: argparse.Namespace) -> Target:
    """Return the target on the CPU, and set the number of threads."""
    torch.set_num_threads(arguments.threads)
    return Target.load(TargetSettings(model=arguments.target, dtype=arguments.dtype, device="cpu"))


def timed(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began
