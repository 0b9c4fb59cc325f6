"""One short training with unequal masks, under any layout; several processes run it as `python -m tests.training.layouts`."""

import gc
import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from drafttrain.cli.app import exit_codes
from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.data_gen.sampler import own_shares
from drafttrain.distributed.collectives import joined, together
from drafttrain.distributed.world import is_first, world
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.lora import LoraSettings
from drafttrain.losses import losses
from drafttrain.target_model import Target, TargetSettings
from drafttrain.training import checkpoint_file
from drafttrain.training.checkpoint_file import PIECE_BYTES
from drafttrain.training.deepspeed_settings import DeepSpeedSettings
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama

BATCH = 8
STEPS = 6


def records_of(step: int, *, count: int = BATCH) -> list[Record]:
    """Return the records of a step: lengths and masks differ, so that a mean of means is another number."""
    generator = torch.Generator().manual_seed(step)
    records = []
    for number in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(1, 257, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.1 + 0.1 * number).tolist()
        records.append(Record(f"{step}.{number}", tokens, [False, *mask[1:-1], True]))
    return records


def unlike(step: int) -> list[DraftBatch]:
    """Return a row that holds two documents in the first process, and one that a document fills in the others."""
    generator, here = torch.Generator().manual_seed(step), world()
    texts = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in (6, 6, 12)]
    records = [Record(f"{step}.{n}", text, [False] + [True] * (len(text) - 1)) for n, text in enumerate(texts)]
    own = records if here.size == 1 else records[:2] if here.rank == 0 else records[2:]
    return [pack(own, width=12, weight_of_step=21.0, step=step)[0]]


def of_step(
    step: int, *, records_per_device: int | None = None, count: int = BATCH, mean_of_means: bool = False
) -> list[DraftBatch]:
    """Return this process's micro-batches; one without records is padding."""
    records, here = records_of(step, count=count), world()
    weight = float(sum(sum(record.loss_mask) for record in records))
    lengths = [len(record.tokens) for record in records]
    shares = own_shares(lengths, records_per_device=records_per_device, rank=here.rank, world_size=here.size)
    batches = []
    for share in shares:
        own = [records[number] for number in share]
        of_own = float(sum(sum(record.loss_mask) for record in own)) * len(shares)
        batch, _ = pack(own or records[:1], width=12, weight_of_step=of_own if mean_of_means else weight, step=step)
        batches.append(batch if own else as_padding(batch))
    return batches


def run(
    folder: Path,
    *,
    stage: int | None = None,
    records_per_device: int | None = None,
    count: int = BATCH,
    optimizer: str = "adamw",
    steps: int = STEPS,
    drafter: type[CausalLMDrafter] = CausalLMDrafter,
    loss: str = "tvdpp",
    kind: str = "causal_lm",
    of_kind: dict[str, Any] | None = None,
    lora: LoraSettings | None = None,
    mean_of_means: bool = False,
    estimate: Any = None,
    target_folder: str | None = None,
    sharded: bool = True,
    logged: bool = False,
    unlike_rows: bool = False,
    deepspeed_file: str | None = None,
    **settings: Any,
) -> list[float]:
    """Train and return the loss of every step.

    Args:
        stage: Of ZeRO; None without DeepSpeed.
        count: Records of a step.
        drafter: The class, where `kind` is causal_lm.
        of_kind: Settings of another kind.
        lora: Adapters beside the weights of the drafter.
        target_folder: Where the target is read from, spread over the processes or not; None: it is made in memory.
        logged: Only the batches of the first process have the target's distribution.
        unlike_rows: The rows are those of `unlike`.
        deepspeed_file: Takes the place of `stage`.
    """
    section = None if stage is None else DeepSpeedSettings(stage=stage)  # type: ignore[arg-type]
    if deepspeed_file is not None:
        section = DeepSpeedSettings(config=deepspeed_file)
    wanted = TrainSettings(
        max_steps=steps,
        batch_size=count,
        records_per_device=records_per_device,
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=3e-3 if optimizer != "sgd" else 0.3,
        weight_decay=0.1,
        warmup_steps=0,
        schedule="constant",
        loggers=["csv"],
        eval_every_steps=0,
        log_every_steps=1,
        checkpoint_every_steps=3,
        deepspeed=section,
    )
    target, whole = (
        Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="") for _ in range(2)
    )
    if target_folder is not None:
        target = target_of(target_folder, folder, sharded=sharded)
    torch.manual_seed(0)
    made: Any = drafter(random_llama(seed=1, num_layers=1))
    if kind != "causal_lm":
        entry: Any = drafters.entry(kind)
        made = entry.component.create(entry.settings(**(of_kind or {})), target=target, tokenizer=target.tokenizer)
        made.fit_vocabulary(lambda: np.arange(257))
    if lora is not None:
        made.train_adapters(lora)
    of_own = partial(of_step, records_per_device=records_per_device, count=count, mean_of_means=mean_of_means)
    if unlike_rows:
        of_own = unlike
    with small_files(None):
        train(
            made,
            losses.build(losses.entry(loss).settings(**({"scope": "batch"} if loss == "tvdpp" else {}))),
            target=target,
            of_step=partial(with_distribution, target=whole, of_step=of_own) if logged and is_first() else of_own,
            estimate=estimate,
            settings=replace(wanted, **settings),
            vocab_size=257,
            folder=folder,
        )
    return curve(folder)


def target_of(target_folder: str, folder: Path, *, sharded: bool) -> Target:
    """Return the target of a folder; note what this process then holds more than before, and the digest of the weights."""
    from drafttrain.training.sharded_target import ShardedTarget

    before = held_numbers()
    target = (ShardedTarget if sharded else Target).load(TargetSettings(model=target_folder))
    held = held_numbers() - before
    census = {"held": held, "weights": target.weights_digest(), "states": states_digest(target)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"target-{world().rank}.json").write_text(json.dumps(census))
    return target


def states_digest(target: Target) -> str:
    """Return the digest of what a target says of two packed documents, bit for bit."""
    records = [Record("", range(1, 9), [True] * 8), Record("", range(20, 25), [True] * 5)]
    batch, _ = pack(records, width=16, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(0, 2), final=True))
    assert seen.final_BTD is not None
    states = [seen.final_BTD, *seen.hidden_BTD.values()]
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()


def held_numbers() -> int:
    """Return how many numbers all tensors of this process hold in memory, shared memory counted once."""
    gc.collect()
    found = {}
    for held in gc.get_objects():
        if issubclass(type(held), torch.Tensor) and not held.is_meta:
            for tensor in (held, getattr(held, "ds_tensor", None)):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    return sum(found.values())


def with_distribution(step: int, *, target: Target, of_step: Any) -> list[DraftBatch]:
    """Return the micro-batches of a step with the target's distribution, as serving logs store it."""
    batches = []
    for batch in of_step(step):
        seen = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True))
        batches.append(replace(batch, target_rows=target.rows_of(seen)))
    return batches


def curve(folder: Path) -> list[float]:
    """Return the losses that metrics.csv holds; the start has none."""
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    return [float(loss) for line in lines[1:] if (loss := line.split(",")[column])]


class Slow(CausalLMDrafter):
    """Takes its time, so that something can happen to a process meanwhile."""

    def forward(self, batch: DraftBatch) -> Any:
        time.sleep(0.2)
        return super().forward(batch)


class Census(CausalLMDrafter):
    """Notes before each micro-batch how many collectives the processes have begun: those of training, and those of their hosts."""

    def forward(self, batch: DraftBatch) -> Any:
        group = joined()
        assert group is not None
        groups = (torch.distributed.group.WORLD, group._control)
        self.counts.append([one._get_sequence_number_for_group() for one in groups])  # type: ignore[union-attr]
        return super().forward(batch)

    counts: ClassVar[list[list[int]]] = []


class PoisonedElsewhere(CausalLMDrafter):
    """At two steps the loss of all processes but the first is no number; its gradient is finite everywhere."""

    def forward(self, batch: DraftBatch) -> Any:
        drafted = super().forward(batch)
        poisoned = batch.step in (2, 4) and not is_first()
        return replace(drafted, extra_loss=torch.tensor(float("nan"))) if poisoned else drafted


class OnASmallDisk(CausalLMDrafter):
    """Finds at some steps that files may not be larger than so many bytes, as on a disk that is full."""

    limits: ClassVar[dict[int, int]] = {}

    def forward(self, batch: DraftBatch) -> Any:
        # The checkpoint before is written under the limit of its own step.
        wait_for_checkpoint()
        limit_files(self.limits.get(batch.step))
        return super().forward(batch)


def wait_for_checkpoint() -> None:
    """Wait until the thread that writes a checkpoint has ended, if there is one."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


class SlowDisk:
    """Lets the disk confirm nothing of a checkpoint for a while, every time it is asked."""

    def __init__(self, seconds: float) -> None:
        self.fsync, self.seconds = os.fsync, seconds

    def __call__(self, file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).parent.name == "checkpoints":
            time.sleep(self.seconds)
        self.fsync(file)


def limit_files(limit: int | None) -> None:
    """Let no file grow beyond some bytes; None: as large as this process may write them."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if limit is None else limit, most))


@contextmanager
def small_files(limit: int | None) -> Iterator[None]:
    """Within this context no file grows beyond some bytes, unless the limit is changed in it.

    pytest writes a test's result before the teardown of its fixtures. With a limit that is still there, a report in a file ends the
    whole run.
    """
    limit_files(limit)
    try:
        yield
    finally:
        limit_files(None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    timeout = float(os.environ.get("TEST_TIMEOUT_SECONDS", "60"))
    with exit_codes(debug=False), together(timeout_seconds=timeout):
        for name, layout in json.loads(sys.argv[-1]):
            folder = Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"process-{world().rank}").write_text(str(os.getpid()))
            OnASmallDisk.limits = {int(step): limit for step, limit in layout.pop("limits", {}).items()}
            os.fsync = SlowDisk(layout.pop("slow_disk", 0.0))
            checkpoint_file.PIECE_BYTES = layout.pop("piece_bytes", PIECE_BYTES)
            drafter = OnASmallDisk if OnASmallDisk.limits else CausalLMDrafter
            drafter = {"slow": Slow, "poisoned": PoisonedElsewhere, "census": Census}.get(layout.pop("as", ""), drafter)
            run(folder, drafter=drafter, **layout)
            if Census.counts:
                (folder / "collectives.json").write_text(json.dumps(Census.counts))
                Census.counts.clear()
