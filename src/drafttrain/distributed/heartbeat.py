"""The heartbeat of one process of a run: it reports once a second, and ends the process when another one has died."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.lifelines import Lifelines
from drafttrain.distributed.world import World

BEAT_SECONDS = 1.0
CUT_SECONDS = 0.5
"""How much later than its store connection a dead process's lifeline may close."""
LEAVE_SECONDS = 12.0
"""How long a process that cannot continue may take to end by itself, and how long the store waits for others to leave."""
STORE_GONE = "the first host, which has the run's store, cannot be reached"


class PeerError(DrafttrainError):
    """Another process of the run died, so this one cannot continue."""


class Heartbeat:
    """A thread that writes this process's heartbeat to the store and watches those of the others.

    Args:
        store: A connection of its own: the main thread may block on another one.
        names: How errors name each rank.
        timeout_seconds: How long another process may be silent.
        step: Returns the optimizer steps taken so far.
    """

    def __init__(
        self,
        store: Any,
        here: World,
        *,
        names: list[str],
        timeout_seconds: float,
        lifelines: Lifelines | None,
        step: Callable[[], int],
    ) -> None:
        self.lost = ""
        """Who died; set once, and the main thread raises it."""
        self._store = store
        self._here = here
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._lifelines = lifelines
        self._step = step
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        """Beat once a second; leave when another process died or was silent for too long."""
        heard: dict[int, tuple[bytes, float]] = {}
        others = [rank for rank in range(self._here.size) if rank != self._here.rank]
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            cut = self._lifelines.cut() if self._lifelines else []
            try:
                self._store.set(f"pulse/{self._here.rank}", f"{beats} {self._step()}")
                self._hear(others, heard)
                gone = self._gone(cut)
            except Exception as error:  # the store's host died; the exception differs by backend
                # The operating system closes the connections of a dying process one after another.
                if not cut and self._lifelines and not self._ended.wait(CUT_SECONDS):
                    cut = self._lifelines.cut()
                if not self._ended.is_set():
                    pulse = heard[cut[0]][0].decode() if cut and cut[0] in heard else ""
                    store_gone = f"{STORE_GONE} ({type(error).__name__})"
                    self._leave(is_gone(self._names[cut[0]], pulse) if cut else store_gone)
                return
            silent = [rank for rank in others if time.monotonic() - heard[rank][1] > self._timeout_seconds]
            if (gone or silent) and not self._ended.is_set():
                self._leave(gone or self._not_heard_of(silent))

    def _hear(self, others: list[int], heard: dict[int, tuple[bytes, float]]) -> None:
        """Read the heartbeats of the others; note the time of those that changed."""
        for rank in others:
            key = f"pulse/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if rank not in heard or heard[rank][0] != beat:
                heard[rank] = (beat, time.monotonic())

    def _gone(self, cut: list[int]) -> str:
        """Return who died, as published by rank 0; a process that left in order did not die."""
        for rank in cut:
            if not self._store.check([f"left/{rank}"]):
                self._store.set("gone", str(rank))
        rank = int(self._store.get("gone")) if self._store.check(["gone"]) else self._here.rank
        if rank == self._here.rank:
            return ""
        if self._store.check([f"failed/{rank}"]):
            return f"{self._names[rank]} failed: {self._store.get(f'failed/{rank}').decode()}"
        key = f"pulse/{rank}"
        return is_gone(self._names[rank], self._store.get(key).decode() if self._store.check([key]) else "")

    def _not_heard_of(self, ranks: list[int]) -> str:
        names = [self._names[rank] for rank in ranks]
        return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} not heard of for {self._timeout_seconds:g} s"

    def _leave(self, reason: str) -> None:
        """End this process from the thread: the main thread may be inside a collective that never returns.

        The main thread first gets the time to end by itself, since it may know more.
        """
        self.lost = reason
        self._ended.wait(LEAVE_SECONDS)
        if self._ended.is_set():
            return
        print(stopped(self._here, reason, step=self._step()), file=sys.stderr, flush=True)
        os._exit(PeerError.exit_code)


def is_gone(name: str, pulse: str) -> str:
    """Return the sentence about a process that died.

    Args:
        pulse: Its last heartbeat: "beats step".
    """
    return f"{name} is gone (last heard of at step {pulse.split()[1] if pulse else 0})"


def stopped(here: World, reason: str, *, step: int) -> str:
    """Return the message with which this process ends."""
    return (
        f"{here.name}: stopped at {time.strftime('%H:%M:%S')} after step {step}: {reason}. "
        "Run the same command to continue from the last checkpoint."
    )
