"""The processes that joined a run: their store, their CPU collectives, and who is missing when one of these fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from drafttrain.distributed.heartbeat import LEAVE_SECONDS, STORE_GONE, Heartbeat, PeerError, is_gone, stopped
from drafttrain.distributed.lifelines import Lifelines
from drafttrain.distributed.world import World, launcher_environment

SILENT_SECONDS = 4.0
"""After a collective failed: a process without a heartbeat for this long is reported as dead."""
LONGEST_REASON = 300
"""Characters of another library's error."""


class Group:
    """The processes that joined: one store, one group of CPU collectives, a heartbeat and a lifeline each.

    Args:
        timeout_seconds: How long a process waits for another inside a collective before it gives up.
    """

    def __init__(self, here: World, *, timeout_seconds: float) -> None:
        import torch
        import torch.distributed as dist

        self.here = here
        self.timeout = timedelta(seconds=timeout_seconds)
        self.step = 0
        """Optimizer steps taken, for the heartbeat."""
        self._waits = 0
        env = launcher_environment()
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        self._serves = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store = self._connected(host, port, serves=self._serves)
        heartbeat_store = self._connected(host, port, serves=False)
        self._lifelines = self._connected_lifelines(host)
        self._store.set(f"name/{here.rank}", f"{socket.gethostname()} (process {os.getpid()})")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=self._store, rank=here.rank, world_size=here.size, timeout=self.timeout)
        # nccl takes only tensors on a GPU: values on the host need a gloo group.
        self._control = dist.new_group(backend="gloo", timeout=self.timeout)
        # Read now, for the time when the store no longer answers.
        self._names = [f"rank {rank} on {self._store.get(f'name/{rank}').decode()}" for rank in range(here.size)]
        self._heartbeat = Heartbeat(
            heartbeat_store,
            here,
            names=self._names,
            timeout_seconds=timeout_seconds,
            lifelines=self._lifelines,
            step=lambda: self.step,
        )

    def _connected(self, host: str, port: int, *, serves: bool) -> Any:
        """Return a connection to the store."""
        import torch.distributed as dist

        store = dist.TCPStore(
            host, port, is_master=serves, timeout=self.timeout, wait_for_workers=False, multi_tenant=serves
        )
        # A restarted attempt must not read the addresses of the one before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"drafttrain-{attempt}", store)

    def _connected_lifelines(self, host: str) -> Lifelines | None:
        try:
            return Lifelines(self._store, rank=self.here.rank, host=host)
        except OSError as error:
            limit = f"train.timeout_seconds ({self.timeout.total_seconds():g})"
            wait = f"a process that is killed may be noticed only after {limit}"
            print(f"{self.here.name}: no connection to rank 0 ({error}): {wait}", file=sys.stderr, flush=True)
            return None

    def shared(self, value: Any) -> list[Any]:
        """Return every process's value, by rank, passed as JSON. It waits for the others as long as they live."""
        import torch.distributed as dist

        self.wait("the processes exchange values")
        values: list[Any] = [None] * self.here.size
        dist.all_gather_object(values, json.dumps(value), group=self._control)
        return [json.loads(text) for text in values]

    def sums_later(self, numbers: Sequence[float]) -> Callable[[], list[float]]:
        """Start to sum numbers on the host over all processes, in float64; all must call it at the same place.

        Returns:
            A function that waits for the sums. Other work can be done in between.
        """
        import torch
        import torch.distributed as dist

        total_N = torch.tensor(numbers, dtype=torch.float64)
        adding: Any = dist.all_reduce(total_N, group=self._control, async_op=True)

        def sums() -> list[float]:
            adding.wait()
            return [float(number) for number in total_N]

        return sums

    def wait(self, what: str, *, ranks: range | None = None, done: bool = True) -> None:
        """Wait without a limit until these processes have arrived here too.

        Args:
            what: What is being waited for, for the error.
            ranks: Whom to wait for; None: all.
            done: This process has arrived: announce it first.

        Raises:
            PeerError: One of them failed or died.
        """
        key = f"wait/{self._waits}"
        self._waits += 1
        if done:
            self._store.set(f"{key}/{self.here.rank}", "here")
        for rank in ranks if ranks is not None else range(self.here.size):
            while not self._store.check([f"{key}/{rank}"]):
                if self._store.check([f"failed/{rank}"]):
                    reason = self._store.get(f"failed/{rank}").decode()
                    raise PeerError(self._stopped(f"{self._names[rank]} failed while {what}: {reason}"))
                if self._heartbeat.lost:
                    raise PeerError(self._stopped(f"{self._heartbeat.lost}, while {what}"))
                time.sleep(0.05)

    def failed(self, error: BaseException) -> None:
        """Report to the others why this process ends."""
        with contextlib.suppress(Exception):
            self._store.set(f"failed/{self.here.rank}", f"{type(error).__name__}: {error}"[:2000])
            self._store.set("gone", str(self.here.rank))

    def why(self, error: BaseException) -> str:
        """Return why this process ends after a failed collective: who failed, who went silent, or the error itself."""
        before = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(ValueError):  # not in the main thread
            # A launcher that noticed the same failure stops all processes; naming the dead one is worth the seconds.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._stopped(self._who_is_gone() or f"a collective failed: {_end_of_message(error)}")
        finally:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, before)

    def close(self) -> None:
        """Leave the run while the others may still be at work. The process with the store leaves last."""
        import torch.distributed as dist

        self._heartbeat.stop()
        dist.destroy_process_group()
        self._store.set(f"left/{self.here.rank}", "")
        if self._serves:
            gone = int(self._store.get("gone")) if self._store.check(["gone"]) else 0
            left = [f"left/{rank}" for rank in range(self.here.size) if rank != gone]
            limit = time.monotonic() + LEAVE_SECONDS
            while time.monotonic() < limit and not self._store.check(left):
                time.sleep(0.05)
        if self._lifelines:
            self._lifelines.close()

    def _stopped(self, reason: str) -> str:
        return stopped(self.here, reason, step=self.step)

    def _who_is_gone(self) -> str:
        """Return who failed or stopped beating; empty: nobody."""
        before: dict[int, str] = {}
        with contextlib.suppress(Exception):  # the store's host died; the exception differs by backend
            before = self._beats()
        limit = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < limit and not self._heartbeat.lost:
            time.sleep(0.1)
        if self._heartbeat.lost:
            return self._heartbeat.lost
        try:
            after = self._beats()
            for rank in range(self.here.size):
                key = f"failed/{rank}"
                if rank != self.here.rank and self._store.check([key]):
                    return f"{self._names[rank]} failed: {self._store.get(key).decode()}"
        except Exception:
            return STORE_GONE
        gone = [rank for rank in after if rank != self.here.rank and after[rank] == before.get(rank)]
        return ", ".join(is_gone(self._names[rank], after[rank]) for rank in gone)

    def _beats(self) -> dict[int, str]:
        """Return the last heartbeat of every process."""
        keys = {rank: f"pulse/{rank}" for rank in range(self.here.size)}
        return {rank: self._store.get(key).decode() if self._store.check([key]) else "" for rank, key in keys.items()}


def _end_of_message(error: BaseException) -> str:
    """Return the end of an error's message: NCCL names the cause last (two processes on one device, a cable)."""
    return " ".join(str(error).split())[-LONGEST_REASON:]
