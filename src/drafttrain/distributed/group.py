"""The processes that joined a run: store, heartbeat, and which of them is missing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.lifelines import Lifelines
from drafttrain.distributed.world import World, environment, has_cuda

BEAT_SECONDS = 1.0
SILENT_SECONDS = 4.0
"""After a collective broke, a process that does not stir for as long is named as the one that is gone."""
CUT_SECONDS = 0.5
"""How much later than its store a process's lifelines may end."""
LEAVE_SECONDS = 12.0
"""How long a process that cannot go on may take to end by itself, and the one with the store waits for the others to leave."""
LONGEST_REASON = 300
"""Characters of another library's error."""
STORE_GONE = "the first host, whose store holds the run together, cannot be reached"


class PeerError(DrafttrainError):
    """Another process of the run is gone: this one cannot go on."""


class Group:
    """The processes that joined: one store for words between them, one group of CPU collectives, one pulse and one lifeline each.

    Args:
        timeout_seconds: How long any process waits for another inside a collective before it gives up.
    """

    def __init__(self, here: World, *, timeout_seconds: float) -> None:
        import torch.distributed as dist

        self.here = here
        self.timeout = timedelta(seconds=timeout_seconds)
        self.step = 0
        """Optimizer steps taken, for the pulse."""
        env = environment()
        # A restarted attempt must not read the addresses of the one before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

        def connected(*, serves: bool) -> Any:
            store = dist.TCPStore(
                host, port, is_master=serves, timeout=self.timeout, wait_for_workers=False, multi_tenant=serves
            )
            return dist.PrefixStore(f"drafttrain-{attempt}", store)

        self._serves = here.rank == 0 and not of_agent
        self._store = connected(serves=self._serves)
        self._pulse_store = connected(serves=False)
        self._lifelines = self._connected_lifelines(host)
        self._ended = threading.Event()
        self._lost = ""
        """Who is gone; the main thread ends with it."""
        self._waits = 0
        self._store.set(f"name/{here.rank}", f"{socket.gethostname()} (process {os.getpid()})")
        backend = "nccl" if has_cuda() else "gloo"
        dist.init_process_group(backend, store=self._store, rank=here.rank, world_size=here.size, timeout=self.timeout)
        # nccl serves tensors on a GPU alone: what the hosts tell each other goes over a group of its own.
        self._control = dist.new_group(backend="gloo", timeout=self.timeout)
        # Kept for the time when nobody answers any more.
        self._names = [f"rank {rank} on {self._store.get(f'name/{rank}').decode()}" for rank in range(here.size)]
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._pulse.start()

    def _connected_lifelines(self, host: str) -> Lifelines | None:
        try:
            return Lifelines(self._store, rank=self.here.rank, host=host)
        except OSError as error:
            wait = f"a process that is killed may be noticed after train.timeout_seconds only ({self.timeout.total_seconds():g})"
            print(f"{self.here.name}: no line to the first process ({error}): {wait}", file=sys.stderr, flush=True)
            return None

    def _beat(self) -> None:
        """Say once a second that this process lives, and how far it is; leave when another is gone or silent for too long."""
        heard: dict[int, tuple[bytes, float]] = {}
        others = [rank for rank in range(self.here.size) if rank != self.here.rank]
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            cut = self._lifelines.cut() if self._lifelines else []
            try:
                self._pulse_store.set(f"pulse/{self.here.rank}", f"{beats} {self.step}")
                for rank in others:
                    key = f"pulse/{rank}"
                    said = self._pulse_store.get(key) if self._pulse_store.check([key]) else b""
                    if rank not in heard or heard[rank][0] != said:
                        heard[rank] = (said, time.monotonic())
                gone = self._gone(cut)
            except Exception as error:  # the store's host is gone; what it raises differs by backend
                # Of a process that dies the system ends one connection after the other.
                if not cut and self._lifelines and not self._ended.wait(CUT_SECONDS):
                    cut = self._lifelines.cut()
                if not self._ended.is_set():
                    steps = heard[cut[0]][0].decode() if cut and cut[0] in heard else ""
                    self._leave(self._is_gone(cut[0], steps) if cut else f"{STORE_GONE} ({type(error).__name__})")
                return
            silent = [r for r in others if time.monotonic() - heard[r][1] > self.timeout.total_seconds()]
            if (gone or silent) and not self._ended.is_set():
                self._leave(gone or self._missing(silent))

    def _gone(self, cut: list[int]) -> str:
        """Return who is gone, as the first process saw it and tells the others; one that took its leave is not."""
        for rank in cut:
            if not self._pulse_store.check([f"left/{rank}"]):
                self._pulse_store.set("gone", str(rank))
        rank = int(self._pulse_store.get("gone")) if self._pulse_store.check(["gone"]) else self.here.rank
        if rank == self.here.rank:
            return ""
        if self._pulse_store.check([f"failed/{rank}"]):
            return f"{self._names[rank]} failed: {self._pulse_store.get(f'failed/{rank}').decode()}"
        key = f"pulse/{rank}"
        return self._is_gone(rank, self._pulse_store.get(key).decode() if self._pulse_store.check([key]) else "")

    def _is_gone(self, rank: int, pulse: str) -> str:
        return f"{self._names[rank]} is gone (last heard of at step {pulse.split()[1] if pulse else 0})"

    def _leave(self, reason: str) -> None:
        """End this process from the pulse: the main thread may be inside a collective that never returns.

        It first gets the time to end by itself, with what it knows.
        """
        self._lost = reason
        self._ended.wait(LEAVE_SECONDS)
        if self._ended.is_set():
            return
        print(f"{self._ends(reason)}", file=sys.stderr, flush=True)
        os._exit(PeerError.exit_code)

    def _ends(self, reason: str) -> str:
        now = time.strftime("%H:%M:%S")
        return (
            f"{self.here.name}: stopped at {now} after step {self.step}: {reason}. "
            "Run the same command to continue from the last checkpoint."
        )

    def _missing(self, ranks: list[int]) -> str:
        names = [self._names[rank] for rank in ranks]
        return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} not heard of for {self.timeout.total_seconds():g} s"

    def why(self, error: BaseException) -> str:
        """Return why this process ends after a collective failed: who said what, who fell silent, or else the error itself."""
        before = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(ValueError):  # not in the main thread
            # A launcher that saw the same asks all to stop; who is gone is worth the seconds.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._ends(self._who_is_gone() or f"a collective failed: {in_one_line(error)}")
        finally:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, before)

    def _who_is_gone(self) -> str:
        before: dict[int, str] = {}
        with contextlib.suppress(Exception):  # whatever the store raises when its host is gone
            before = self._beats()
        limit = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < limit and not self._lost:
            time.sleep(0.1)
        if self._lost:
            return self._lost
        try:
            after = self._beats()
            for rank in range(self.here.size):
                key = f"failed/{rank}"
                if rank != self.here.rank and self._store.check([key]):
                    return f"{self._names[rank]} failed: {self._store.get(key).decode()}"
        except Exception:
            return STORE_GONE
        gone = [rank for rank in after if rank != self.here.rank and after[rank] == before.get(rank)]
        return ", ".join(self._is_gone(rank, after[rank]) for rank in gone)

    def _beats(self) -> dict[int, str]:
        keys = {rank: f"pulse/{rank}" for rank in range(self.here.size)}
        return {rank: self._store.get(key).decode() if self._store.check([key]) else "" for rank, key in keys.items()}

    def failed(self, error: BaseException) -> None:
        """Tell the others why this process ends."""
        with contextlib.suppress(Exception):
            self._store.set(f"failed/{self.here.rank}", f"{type(error).__name__}: {error}"[:2000])
            self._store.set("gone", str(self.here.rank))

    def shared(self, value: Any) -> list[Any]:
        """Return every process's value, by rank; it goes as JSON. The others are waited for as long as they live."""
        import torch.distributed as dist

        self.wait("they compare notes")
        values: list[Any] = [None] * self.here.size
        dist.all_gather_object(values, json.dumps(value), group=self._control)
        return [json.loads(text) for text in values]

    def sums_later(self, numbers: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to add up numbers of the host over all processes, in float64; all must call it at the same place.

        Returns:
            What waits for the sums. In between each process does other things.
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
        """Wait, for as long as it takes, until these processes have come here too; those that are done say so first."""
        key = f"wait/{self._waits}"
        self._waits += 1
        if done:
            self._store.set(f"{key}/{self.here.rank}", "here")
        for rank in ranks if ranks is not None else range(self.here.size):
            while not self._store.check([f"{key}/{rank}"]):
                if self._store.check([f"failed/{rank}"]):
                    reason = self._store.get(f"failed/{rank}").decode()
                    raise PeerError(self._ends(f"{self._names[rank]} failed while {what}: {reason}"))
                if self._lost:
                    raise PeerError(self._ends(f"{self._lost}, while {what}"))
                time.sleep(0.05)

    def close(self) -> None:
        """Leave; the others may still be at work. The process with the store leaves after them: they look there until they do."""
        import torch.distributed as dist

        self._ended.set()
        self._pulse.join()
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


def in_one_line(error: BaseException) -> str:
    """Return the end of an error's words, where NCCL says what it met: a device that two processes took, a cable."""
    return " ".join(str(error).split())[-LONGEST_REASON:]
