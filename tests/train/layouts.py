"""One short training with unequal masks, under any layout; several processes run it as `python -m tests.train.layouts`."""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drafttrain.cli import exit_codes
from drafttrain.core.processes import together, world
from drafttrain.core.records import DraftBatch, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm import CausalLMDrafter
from drafttrain.drafters.medusa import Medusa, MedusaSettings
from drafttrain.losses import losses
from drafttrain.target import Target
from drafttrain.train.deepspeed_settings import DeepSpeedSettings
from drafttrain.train.run import train
from drafttrain.train.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama

BATCH = 8
STEPS = 6


def records_of(step: int) -> list[Record]:
    """Return the records of a step: lengths and masks differ, so that a mean of means is another number."""
    generator = torch.Generator().manual_seed(step)
    records = []
    for number in range(BATCH):
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(1, 257, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.1 + 0.1 * number).tolist()
        records.append(Record(f"{step}.{number}", tokens, [False, *mask[1:-1], True]))
    return records


def of_step(step: int, *, accumulation: int, mean_of_means: bool = False) -> list[DraftBatch]:
    """Return this process's micro-batches."""
    records, here = records_of(step), world()
    weight = float(sum(sum(record.loss_mask) for record in records))
    own = records[here.rank :: here.size]
    size = len(own) // accumulation
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    weights = [float(sum(sum(r.loss_mask) for r in part)) * len(parts) if mean_of_means else weight for part in parts]
    return [pack(part, width=12, weight_of_step=w, step=step)[0] for part, w in zip(parts, weights, strict=True)]


def run(
    folder: Path,
    *,
    stage: int | None = None,
    accumulation: int = 1,
    optimizer: str = "adamw",
    steps: int = STEPS,
    drafter: type[CausalLMDrafter] = CausalLMDrafter,
    kind: str = "causal_lm",
    mean_of_means: bool = False,
    **settings: Any,
) -> list[float]:
    """Train and return the loss of every step.

    Args:
        stage: Of ZeRO; None without DeepSpeed.
    """
    wanted = TrainSettings(
        max_steps=steps,
        batch_size=BATCH,
        accumulation=accumulation,
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=1e-2 if optimizer != "sgd" else 0.3,
        weight_decay=0.1,
        warmup_steps=0,
        schedule="constant",
        loggers=["csv"],
        eval_every_steps=0,
        log_every_steps=1,
        checkpoint_every_steps=3,
        deepspeed=None if stage is None else DeepSpeedSettings(stage=stage),  # type: ignore[arg-type]
    )
    target = Target(random_llama(), byte_tokenizer(), name="tiny", fingerprint="")
    made = (
        drafter(random_llama(seed=1, num_layers=1))
        if kind == "causal_lm"
        else Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer)
    )
    train(
        made,
        losses.build(losses.entry("tvdpp").settings(scope="batch")),
        target=target,
        of_step=partial(of_step, accumulation=accumulation, mean_of_means=mean_of_means),
        estimate=None,
        settings=replace(wanted, **settings),
        vocab_size=257,
        folder=folder,
    )
    return curve(folder)


def curve(folder: Path) -> list[float]:
    """Return the losses that metrics.csv holds."""
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


class Slow(CausalLMDrafter):
    """Takes its time, so that something can happen to a process meanwhile."""

    def forward(self, batch: DraftBatch) -> Any:
        time.sleep(0.2)
        return super().forward(batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    timeout = float(os.environ.get("TEST_TIMEOUT_SECONDS", "60"))
    with exit_codes(debug=False), together(timeout_seconds=timeout):
        for name, layout in json.loads(sys.argv[-1]):
            folder = Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"process-{world().rank}").write_text(str(os.getpid()))
            run(folder, drafter=Slow if layout.pop("slow", False) else CausalLMDrafter, **layout)
