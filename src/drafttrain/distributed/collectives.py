"""What the processes of a run do together: join, wait, share values, sum. With one process nothing waits."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.group import Group, PeerError
from drafttrain.distributed.world import TORCHRUN, World, environment, has_cuda, is_first, world

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
    env = environment()
    os.environ.update({name: env[name] for name in TORCHRUN})
    if not has_cuda():
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
    if _joined is not None and not is_first():
        _joined.wait(what, ranks=range(1), done=False)
    _turn = what
    try:
        yield
    finally:
        _turn = None
    if _joined is not None and is_first():
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
