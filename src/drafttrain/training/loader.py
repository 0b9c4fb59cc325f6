"""Micro-batches, prepared while the device computes: a thread packs the next optimizer step, a side stream copies the next micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from drafttrain.core.batches import Late


class Steps:
    """The micro-batches from one step on; `of_step` is a pure function, so a resume needs one integer.

    While the micro-batches of one step are read, a thread makes those of the next. Its errors are raised in the reader.

    Args:
        of_step: Called in the thread: it reads files, and no model.
        prepared: What else the thread does with a micro-batch.
        sent: What is done with it when it is asked for.
    """

    def __init__(
        self,
        of_step: Callable[[int], Sequence[Any]],
        *,
        start: int,
        stop: int,
        prepared: Callable[[Any], Any] = lambda batch: batch,
        sent: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        self.of_step = of_step
        self.start = start
        self.stop = stop
        self.prepared = prepared
        self.sent = sent
        self._readers: list[Generator[Any]] = []

    def __iter__(self) -> Iterator[Any]:
        self._readers.append(self._micro_batches())
        return self._readers[-1]

    def _micro_batches(self) -> Generator[Any]:
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ahead = None
            for step in range(self.start, self.stop):
                made = (ahead or thread.submit(self._made, step)).result()
                ahead = thread.submit(self._made, step + 1) if step + 1 < self.stop else None
                yield from map(self.sent, made)

    def _made(self, step: int) -> list[Any]:
        return [self.prepared(batch) for batch in self.of_step(step)]

    def close(self) -> None:
        """End the thread after its current step: training may stop before the last step."""
        for reader in self._readers:
            reader.close()


@dataclass(frozen=True)
class Sent:
    """A micro-batch on its way to a GPU."""

    batch: Any
    arrived: Any
    """The event of the side stream."""


class SideStream:
    """Copies micro-batches to a GPU while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, batch: Any) -> Any:
        """Return a micro-batch in pinned memory."""
        # A thread starts on the first GPU, and would allocate memory there.
        with torch.cuda.device(self.device):
            return batch.each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def send(self, batch: Any) -> Sent:
        """Start to copy a micro-batch."""
        with torch.cuda.stream(self._stream):
            moved = batch.each(lambda tensor: tensor.to(self.device, non_blocking=True))
        return Sent(moved, self._stream.record_event())

    def received(self, sent: Sent) -> Any:
        """Return the micro-batch. Later work of the GPU waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(sent.arrived)

        def used_by_current(tensor: Tensor) -> Tensor:
            # The memory belongs to the side stream, which would reuse it as soon as the tensor is freed.
            tensor.record_stream(current)
            return tensor

        return sent.batch.each(used_by_current)


class Drawing(Protocol):
    """What draws late micro-batches, and has a state that checkpoints hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class StepData(LightningDataModule):
    """The micro-batches of a training. Lightning builds the loader after a checkpoint was restored.

    Args:
        planned: What the host finds out about a micro-batch before it is sent.
        made: Makes a late micro-batch, in the thread that trains.
    """

    def __init__(
        self,
        of_step: Callable[[int], Sequence[Any]],
        *,
        planned: Callable[[Any], Any],
        made: Callable[[Late], Any],
        stop: int,
        drawing: Drawing | None = None,
    ) -> None:
        super().__init__()
        self._of_step = of_step
        self._planned = planned
        self._made = made
        self._stop = stop
        self._drawing = drawing
        self._steps: Steps | None = None
        self._side: SideStream | None = None

    def train_dataloader(self) -> Steps:
        """Return the micro-batches from the current step on."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self._side = SideStream(device) if device.type == "cuda" else None
        self._steps = Steps(
            self._of_step,
            start=self.trainer.global_step,
            stop=self._stop,
            prepared=self._prepared,
            # Lightning fetches one micro-batch ahead, which is copied meanwhile.
            sent=self._sent,
        )
        return self._steps

    def _prepared(self, batch: Any) -> Any:
        if isinstance(batch, Late):
            return batch
        planned = self._planned(batch)
        return planned if self._side is None else self._side.pinned(planned)

    def _sent(self, batch: Any) -> Any:
        return batch if self._side is None or isinstance(batch, Late) else self._side.send(batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a micro-batch on the device; it is made on the CPU. The weights are those that will read it."""
        if isinstance(batch, Late):
            batch = self._sent(self._prepared(self._made(batch)))
        if self._side is not None:
            return self._side.received(batch)
        return batch if device.type == "cpu" else batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs of late micro-batches."""
        return {} if self._drawing is None else self._drawing.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        if self._drawing is not None:
            self._drawing.load_state_dict(state_dict)

    def close(self) -> None:
        """End the loader's thread."""
        if self._steps is not None:
            self._steps.close()
