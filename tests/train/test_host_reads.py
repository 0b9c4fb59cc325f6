"""A micro-batch asks the device for at most two numbers, whatever is trained: a host that waits leaves a GPU without work.

Counted on a CPU: what would wait on a GPU is the same operations, called by the thread that trains.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.target import Target
from drafttrain.train.run import train
from drafttrain.train.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.train.layouts import of_step

ALLOWED = 2
ACCUMULATION = 2
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "medusa": ("medusa", {"num_heads": 2}, "ce"),
    "kangaroo": ("kangaroo", {"exit_layer": 1}, "forward_kl"),
    "eagle": ("eagle", {"num_steps": 2}, "forward_kl"),
}
SIZED_BY_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
SIZED_BY_VALUES |= {"bincount", "equal"}


class Reads(TorchDispatchMode):
    """Counts what reads a number, or the size of a result, off the device, in the thread that enters."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in SIZED_BY_VALUES or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self.counts[name] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            masks = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor) and i.dtype is torch.bool]
            # One value at the places of a mask is a fill.
            self.counts["boolean index"] += len(masks) if name.endswith("index") or args[2].numel() != 1 else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count within the block, also what goes to the host by name and is no operation on a CPU."""
    counting, here = Reads(), threading.current_thread()

    def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            counting.counts[name] += threading.current_thread() is here
            return inner(*args, **kwargs)

        return method

    with monkeypatch.context() as patched, counting:
        for name in ("cpu", "tolist", "numpy"):
            patched.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        yield counting.counts


def fitted(kind: str, folder: Path, *, steps: int) -> None:
    """Train a kind for some steps; metrics.csv gets a row after the last one."""
    name, settings, loss = KINDS[kind]
    target = Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")
    entry: Any = drafters.entry(name)
    torch.manual_seed(0)
    drafter = entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer)
    drafter.fit_vocabulary(lambda: np.arange(257))
    train(
        drafter,
        losses.build(losses.entry(loss).settings()),
        target=target,
        of_step=partial(of_step, accumulation=ACCUMULATION),
        estimate=None,
        settings=TrainSettings(
            max_steps=steps,
            batch_size=8,
            accumulation=ACCUMULATION,
            warmup_steps=0,
            loggers=["csv"],
            eval_every_steps=0,
            log_every_steps=100,
        ),
        vocab_size=257,
        folder=folder,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_reads_at_most_two_numbers_off_the_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for steps in (1, 2):
        with reads(monkeypatch) as counts:
            fitted(kind, tmp_path / str(steps), steps=steps)
        found.append(counts)
    # What begins and ends a training is in both.
    of_a_step = found[1] - found[0]
    assert sum(of_a_step.values()) <= ACCUMULATION * ALLOWED, dict(of_a_step)
