"""The processes of a run: which one this is, how they wait for each other, and who is missing.

A launcher (torchrun, deepspeed, srun) starts the same command several times and tells each process its number by the
environment. Where there is one process, nothing here waits and nothing is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError, RecipeError
from drafttrain.core.lifelines import Lifelines

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LAUNCHED = (*TORCHRUN, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")
"""What a process started from here must not inherit."""
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


@dataclass(frozen=True)
class World:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine; once it has joined, the number of its device among those that it sees."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def name(self) -> str:
        """What errors call this process."""
        return f"rank {self.rank} on {socket.gethostname()}"


class PeerError(DrafttrainError):
    """Another process of the run is gone: this one cannot go on."""


def world() -> World:
    """Return which process this is, as the launcher says.

    Raises:
        RecipeError: The environment names some of what is needed and not the rest.
    """
    env = _environment()
    if not env:
        return World()
    size, local_rank = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    return World(int(env["RANK"]), size, local_rank, min(size, max(_local_size(env), local_rank + 1)))


def _local_size(env: Mapping[str, str]) -> int:
    """Return how many processes the launcher started on this machine: torchrun, DeepSpeed and Slurm each name it differently."""
    if named := env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE"):
        return int(named)
    of_nodes = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1"
    tasks: list[int] = []
    for part in of_nodes.split(","):  # 4(x2),1: four on each of two nodes, one on the third
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks[min(int(env.get("SLURM_NODEID", "0")), len(tasks) - 1)]


def first() -> bool:
    """Tell whether this is the process that speaks and writes."""
    return world().rank == 0


def launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return world().size > 1


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that is on its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHED and not name.startswith(("TORCHELASTIC_", "SLURM_"))
    }


def for_own_program(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for another program that one of several processes starts: on its own, on the device of this process."""
    own = without_launcher(environment)
    if launched():
        devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = world().local_rank
        # A launcher that shows each process its own device only has named it already.
        own["CUDA_VISIBLE_DEVICES"] = devices[number] if number < len(devices) else ",".join(devices) or str(number)
    return own


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env |= {name: env[slurm] for name, slurm in SLURM.items()}
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 15000))
    if "RANK" not in env or env.get("WORLD_SIZE", "1") == "1":
        return {}
    missing = [name for name in TORCHRUN if name not in env]
    if missing:
        raise RecipeError(
            "environment",
            [
                f"RANK is set but {', '.join(missing)} is not: start with torchrun, deepspeed or srun (docs/multi-node.md)"
            ],
        )
    return env


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: `node[03-05,09],login1` begins with node03."""
    if not nodes:
        return "127.0.0.1"
    head, bracket, rest = nodes.partition("[")
    return head + rest.replace(",", "-").replace("]", "-").split("-")[0] if bracket else head.split(",")[0]


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
        env = _environment()
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
        backend = "nccl" if _cuda() else "gloo"
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
            return self._ends(self._who_is_gone() or f"a collective failed: {_in_one_line(error)}")
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


_joined: Group | None = None
_turn: str | None = None
"""What the process does while the others wait for their turn, or have had it."""


def joined() -> Group | None:
    """Return the group of this process; None: it is alone."""
    return _joined


@contextlib.contextmanager
def together(*, timeout_seconds: float) -> Iterator[Group | None]:
    """Join the other processes for the block; one process just goes on.

    Raises:
        PeerError: Another one is gone; the message says who, when and after which step.
    """
    global _joined
    here = world()
    if here.size == 1 or _joined is not None:
        yield _joined
        return
    here = _on_own_device(here)
    try:
        group = Group(here, timeout_seconds=timeout_seconds)
    except Exception as error:  # a wrong address and a port in use are RuntimeErrors of several kinds
        raise DrafttrainError(
            f"{here.name}: no connection to the other {here.size - 1} processes through "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}"
        ) from error
    _joined = group
    try:
        yield group
        group.wait("the others finish")
    except PeerError:
        raise
    except BaseException as error:
        if _is_of_a_connection(error):
            raise PeerError(group.why(error)) from error
        group.failed(error)
        raise
    finally:
        _joined = None
        with contextlib.suppress(RuntimeError):
            group.close()


def _on_own_device(here: World) -> World:
    """Return this process with the number of its CUDA device, which is the current one from now on.

    Launchers that show each process its own device alone (`srun --gpus-per-task=1`, Kubernetes) number the processes of a
    machine from 0 all the same.

    Raises:
        DrafttrainError: CUDA refuses the device.
    """
    env = _environment()
    os.environ.update({name: env[name] for name in TORCHRUN})
    if not _cuda():
        return here
    import torch

    count = torch.cuda.device_count()
    number = here.local_rank % count
    try:
        torch.cuda.set_device(number)
    except RuntimeError as error:  # a device that another program holds alone, or one that is broken
        reason = str(error).splitlines()[0]
        raise DrafttrainError(
            f"{here.name}: CUDA device {number} of the {count} that it sees cannot be used: {reason}"
        ) from error
    # Lightning, DeepSpeed and transformers all take it for the number of the device.
    os.environ["LOCAL_RANK"] = str(number)
    return replace(here, local_rank=number)


def _in_one_line(error: BaseException) -> str:
    """Return the end of an error's words, where NCCL says what it met: a device that two processes took, a cable."""
    return " ".join(str(error).split())[-LONGEST_REASON:]


def _is_of_a_connection(error: BaseException) -> bool:
    """Tell whether a collective failed because another process left it."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    words = (
        *("connection closed by peer", "timed out waiting", "connection reset", "nccl error", "broken pipe"),
        *("socket closed", "pair closure"),
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def shared(value: Any) -> list[Any]:
    """Return every process's value, by rank."""
    _refuse_to_wait()
    return [value] if _joined is None else _joined.shared(value)


def sums_over_processes(numbers: Sequence[float]) -> list[float]:
    """Return the sums over all processes of numbers on the host: counts, flags, sums for a row of metrics."""
    _refuse_to_wait()
    return sums_later(numbers)()


def sums_later(numbers: Sequence[float]) -> Callable[[], list[float]]:
    """Begin to add up numbers on the host over all processes, and return what waits for the sums."""
    _refuse_to_wait()
    own = [float(number) for number in numbers]
    return (lambda: own) if _joined is None else _joined.sums_later(own)


def any_of(flag: bool) -> bool:
    """Tell whether a process says yes; all get the same answer."""
    return any(shared(flag))


def agree(what: str, value: Any) -> None:
    """Require that every process has the same value.

    Raises:
        DrafttrainError: Naming the ranks and hosts that differ from rank 0.
    """
    values = shared([value, socket.gethostname()])
    different = [
        f"rank {rank} on {host}: {other}" for rank, (other, host) in enumerate(values) if other != values[0][0]
    ]
    if different:
        head = f"rank 0 on {values[0][1]}: {values[0][0]}"
        raise DrafttrainError("\n  ".join([f"{what} is not the same on every process:", head, *different]))


def wait_for_all(what: str) -> None:
    """Wait until every process is here, for as long as the others live."""
    _refuse_to_wait()
    if _joined is not None:
        _joined.wait(what)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Let the first process go through the block alone; then the others, which find what it made.

    Nothing inside may wait for the others: they come only after it. That is refused also where there is one process.
    """
    global _turn
    _refuse_to_wait()
    if _joined is not None and not first():
        _joined.wait(what, ranks=range(1), done=False)
    _turn = what
    try:
        yield
    finally:
        _turn = None
    if _joined is not None and first():
        _joined.wait(what, ranks=range(0))


def _refuse_to_wait() -> None:
    assert _turn is None, f"a process waits for the others while {_turn}, and they wait for that"


def at_step(step: int) -> None:
    """Let the pulse say how far this process is."""
    if _joined is not None:
        _joined.step = step


def own_share(pieces: Sequence[int]) -> list[int]:
    """Return the pieces of work that are this process's; the first process's list is the one that is shared out."""
    here = world() if _joined is not None else World()
    every: list[int] = shared(list(pieces))[0]
    return every[here.rank :: here.size]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def say_world() -> None:
    """Say how many processes there are."""
    if _joined is not None:
        hosts = list(dict.fromkeys(shared(socket.gethostname())))
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
        restart = f", restart {again} of {allowed}" if again else ""
        say(
            f"{_joined.here.size} processes on {len(hosts)} host{'s' if len(hosts) != 1 else ''}: {', '.join(hosts)}{restart}"
        )
