"""A killed process is noticed at once wherever the others wait, and the process with the store leaves last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from drafttrain.distributed import collectives
from drafttrain.distributed.heartbeat import BEAT_SECONDS, PeerError
from drafttrain.distributed.lifelines import Lifelines
from drafttrain.distributed.world import without_launcher

HEAD = """
import os, sys, time
from pathlib import Path
import drafttrain.distributed.collectives as processes
from drafttrain.distributed.heartbeat import PeerError
from drafttrain.distributed.collectives import together, wait_for_all

here, folder = processes.world(), Path(sys.argv[1])
"""


def started(code: str, folder: Path, *, rank: int, port: int) -> subprocess.Popen[str]:
    """Start one of two processes as srun does: no launcher watches them."""
    launcher = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    environment = without_launcher(os.environ) | launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(code), str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def port() -> int:
    """A port outside the range from which the system assigns ports."""
    for number in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as tried:
            try:
                tried.bind(("", number))
            except OSError:
                continue
            return number
    raise AssertionError("no free port")


@pytest.mark.processes
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_noticed_at_once_even_by_a_waiting_one(tmp_path: Path, port: int, killed: int) -> None:
    code = f"""
        try:
            with together(timeout_seconds=600):
                processes.at_step(7)
                if here.rank == {killed}:
                    (folder / "there").touch()
                    time.sleep(600)
                wait_for_all("texts are generated")
        except PeerError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
    """
    running = [started(code, tmp_path, rank=rank, port=port) for rank in (0, 1)]
    while not (tmp_path / "there").exists():
        assert running[killed].poll() is None, running[killed].communicate()[1]
        time.sleep(0.01)
    time.sleep(4 * BEAT_SECONDS)  # Its own heartbeat, then the other one's, so that its step is known.
    running[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    output = running[1 - killed].communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
    running[killed].communicate()
    assert running[1 - killed].returncode == PeerError.exit_code
    assert f"rank {killed} on " in output
    assert "is gone (last heard of at step 7)" in output


@pytest.mark.processes
def test_the_process_with_the_store_leaves_last(tmp_path: Path, port: int) -> None:
    """The second process checks the store long after the first one would have left."""
    code = """
        real = time.sleep
        if here.rank == 1:
            time.sleep = lambda seconds: real(3)
        with together(timeout_seconds=60):
            if here.rank == 0:
                wait_until = time.monotonic() + 30
                while not processes.joined()._store.check(["wait/0/1"]) and time.monotonic() < wait_until:
                    real(0.01)
    """
    running = [started(code, tmp_path, rank=rank, port=port) for rank in (0, 1)]
    output = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], output


@pytest.mark.processes
def test_host_numbers_are_summed_if_the_main_group_takes_only_gpu_tensors(tmp_path: Path, port: int) -> None:
    """Like nccl: a group that is bound to cuda refuses a tensor on the CPU, which is tried first."""
    code = """
        import torch
        import torch.distributed as dist

        init = dist.init_process_group
        dist.init_process_group = lambda backend, **kwargs: init("cuda:gloo", **kwargs)
        with together(timeout_seconds=60):
            try:
                dist.all_reduce(torch.ones(1))
            except RuntimeError as error:
                assert "No backend type associated with device type cpu" in str(error)
            else:
                raise AssertionError("the group is to refuse tensors on the CPU")
            assert processes.sums_over_processes([here.rank + 1, 0.1]) == [3.0, 0.2]
            assert processes.shared(here.rank) == [0, 1]
            assert processes.any_of(here.rank == 1)
            wait_for_all("the end")
    """
    running = [started(code, tmp_path, rank=rank, port=port) for rank in (0, 1)]
    output = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], output


@pytest.mark.processes
def test_a_failed_collective_reports_its_cause_if_nobody_died(tmp_path: Path, port: int) -> None:
    """Like nccl if two processes took the same device: nobody died, and the end of its message names the cause."""
    code = """
        import torch.distributed as dist
        words = "NCCL error in: NCCLUtils.cpp:77, invalid usage\\nLast error:\\nDuplicate GPU detected : rank 1 and rank 0"
        try:
            with together(timeout_seconds=60):
                raise dist.DistBackendError(words)
        except PeerError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
    """
    running = [started(code, tmp_path, rank=rank, port=port) for rank in (0, 1)]
    output = [process.communicate(timeout=60)[1] for process in running]
    assert any(
        "a collective failed: " in one and "Duplicate GPU detected : rank 1 and rank 0." in one for one in output
    ), output


def test_lightning_reduces_nothing_in_training() -> None:
    """Its strategies reduce on the devices' group, which takes no tensors on the host."""
    folder = Path(collectives.__file__).parents[1]
    reduced = [path.name for path in folder.rglob("*.py") if "strategy.reduce(" in path.read_text(encoding="utf-8")]
    assert reduced == []


class Store(dict[str, bytes]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]


def test_a_lifeline_is_cut_with_its_other_end_and_strangers_are_rejected() -> None:
    store = Store()
    first = Lifelines(store, rank=0, host="127.0.0.1")
    address, port, _ = store["lifelines"].decode().split()
    second, third = (Lifelines(store, rank=rank, host="127.0.0.1") for rank in (1, 2))
    with socket.create_connection((address, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert (first.cut(), second.cut(), third.cut()) == ([], [], [])
    assert first.cut() == []
    second.close()
    assert first.cut() == [1]
    assert first.cut() == []
    first.close()
    assert third.cut() == [0]
    with pytest.raises(OSError, match="refused"):
        Lifelines(store, rank=1, host="127.0.0.1")
