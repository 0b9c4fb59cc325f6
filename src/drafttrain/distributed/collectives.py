"""What the processes of a run do together: join, wait, exchange values, sum. A single process never waits."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.group import Group
from drafttrain.distributed.heartbeat import PeerError
from drafttrain.distributed.world import TORCHRUN, World, is_first, launcher_environment, world

CONNECTION_ERRORS = (
    *("connection closed by peer", "timed out waiting", "connection reset", "nccl error", "broken pipe"),
    *("socket closed", "pair closure"),
)
"""Messages of a collective that another process left, in lower case."""

_joined: Group | None = None
_turn: str | None = None
"""What this process does inside `first_before_others`, while others wait for it."""


@contextlib.contextmanager
def together(*, timeout_seconds: float) -> Iterator[Group | None]:
    """Join the other processes for the block; a single process does nothing.

    Raises:
        PeerError: Another process died; the message names it, the time and the last step.
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
        if _is_connection_error(error):
            raise PeerError(group.why(error)) from error
        group.failed(error)
        raise
    finally:
        _joined = None
        with contextlib.suppress(RuntimeError):
            group.close()


def joined() -> Group | None:
    """Return the group of this process; None: it runs alone."""
    return _joined


def shared(value: Any) -> list[Any]:
    """Return every process's value, by rank."""
    _refuse_to_wait()
    return [value] if _joined is None else _joined.shared(value)


def any_of(flag: bool) -> bool:
    """Return whether the flag is true in any process; all get the same answer."""
    return any(shared(flag))


def sums_over_processes(numbers: Sequence[float]) -> list[float]:
    """Return the sums over all processes of numbers on the host: counts, flags, sums for a row of metrics."""
    _refuse_to_wait()
    return sums_later(numbers)()


def sums_later(numbers: Sequence[float]) -> Callable[[], list[float]]:
    """Start to sum numbers on the host over all processes; return a function that waits for the sums."""
    _refuse_to_wait()
    own = [float(number) for number in numbers]
    return (lambda: own) if _joined is None else _joined.sums_later(own)


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
    """Run the block in rank 0 first, then in the others, which find what rank 0 made.

    Nothing inside may wait for the other processes: they come only after it. This is refused in a single process too.
    """
    global _turn
    _refuse_to_wait()
    if _joined is not None and not is_first():
        _joined.wait(what, ranks=range(1), done=False)
    _turn = what
    try:
        yield
    finally:
        _turn = None
    if _joined is not None and is_first():
        _joined.wait(what, ranks=range(0))


def own_share(pieces: Sequence[int]) -> list[int]:
    """Return this process's share of the pieces of work; rank 0's list is the one that is divided."""
    here = world() if _joined is not None else World()
    every: list[int] = shared(list(pieces))[0]
    return every[here.rank :: here.size]


def at_step(step: int) -> None:
    """Report the optimizer step of this process in its heartbeat."""
    if _joined is not None:
        _joined.step = step


def report_world() -> None:
    """Log how many processes and hosts there are."""
    if _joined is not None:
        hosts = list(dict.fromkeys(shared(socket.gethostname())))
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
        restart = f", restart {again} of {allowed}" if again else ""
        plural = "s" if len(hosts) != 1 else ""
        say(f"{_joined.here.size} processes on {len(hosts)} host{plural}: {', '.join(hosts)}{restart}")


def _on_own_device(here: World) -> World:
    """Make this process's CUDA device the current one; return the process with the number of that device.

    Launchers that show each process only its own device (`srun --gpus-per-task=1`, Kubernetes) still number the processes
    of a machine from 0.

    Raises:
        DrafttrainError: CUDA refuses the device.
    """
    import torch

    env = launcher_environment()
    os.environ.update({name: env[name] for name in TORCHRUN})
    if not torch.cuda.is_available():
        return here
    count = torch.cuda.device_count()
    number = here.local_rank % count
    try:
        torch.cuda.set_device(number)
    except RuntimeError as error:  # the device is broken, or another program holds it exclusively
        reason = str(error).splitlines()[0]
        raise DrafttrainError(
            f"{here.name}: CUDA device {number} of the {count} visible ones cannot be used: {reason}"
        ) from error
    # Lightning, DeepSpeed and transformers read the number of the device from here.
    os.environ["LOCAL_RANK"] = str(number)
    return replace(here, local_rank=number)


def _is_connection_error(error: BaseException) -> bool:
    """Return whether a collective failed because another process left it."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in CONNECTION_ERRORS)


def _refuse_to_wait() -> None:
    assert _turn is None, f"a process waits for the others while {_turn}, and they wait for that"
