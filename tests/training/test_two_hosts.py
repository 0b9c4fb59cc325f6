"""Two hosts, as network namespaces with one cable between them: equal numbers, a host that dies, a cable that is cut."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drafttrain.distributed.world import without_launcher
from tests.training.layouts import curve, run

pytestmark = pytest.mark.multi_host
SLOW = {"stage": 2, "steps": 400, "as": "slow"}


class Hosts:
    """Hosts A and B."""

    ADDRESS = "10.99.0.1"

    def __init__(self) -> None:
        self.names = {host: f"dt{host}{os.getpid()}" for host in "AB"}
        self.port = 29000 + os.getpid() % 2000

    def plug(self) -> None:
        """Make both hosts and the cable."""
        ends = {host: f"v{name}" for host, name in self.names.items()}
        for name in self.names.values():
            _ip("netns", "add", name)
        _ip("link", "add", ends["A"], "type", "veth", "peer", "name", ends["B"])
        for number, (host, name) in enumerate(self.names.items(), start=1):
            _ip("link", "set", ends[host], "netns", name)
            _ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", ends[host])
            _ip("-n", name, "link", "set", ends[host], "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Pull the cable out of B."""
        _ip("-n", self.names["B"], "link", "set", f"v{self.names['B']}", "down")

    def kill(self, host: str) -> None:
        """Kill every process of a host: its launcher's children are in sessions of their own."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True)
        for process in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def unplug(self) -> None:
        """Remove both, and what runs on them."""
        for host, name in self.names.items():
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(host)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(
        self, host: str, *launcher: str, work: list[Any], log: Path, timeout: float = 60.0
    ) -> subprocess.Popen[bytes]:
        """Start the layouts' program on a host, in a process group of its own."""
        environment = without_launcher(os.environ) | {
            "GLOO_SOCKET_IFNAME": f"v{self.names[host]}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TEST_TIMEOUT_SECONDS": str(timeout),
            "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = ["ip", "netns", "exec", self.names[host], *launcher, json.dumps(work)]
        return subprocess.Popen(
            command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def torchrun(self, host: str) -> list[str]:
        """Return the command of a host under torchrun."""
        node = "AB".index(host)
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
            *("--nproc-per-node", "1", "--master-addr", self.ADDRESS, "--master-port", str(self.port)),
            *("-m", "tests.training.layouts"),
        ]

    def deepspeed(self, host: str, folder: Path) -> list[str]:
        """Return the command of a host under DeepSpeed's launcher."""
        hostfile = folder / "hostfile"
        hostfile.write_text(f"{self.ADDRESS} slots=1\n10.99.0.2 slots=1\n", encoding="utf-8")
        node = "AB".index(host)
        launcher = Path(sys.executable).with_name("deepspeed")
        return [
            *(sys.executable, str(launcher), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)),
            *("--master_addr", self.ADDRESS, "--master_port", str(self.port), "--module", "tests.training.layouts"),
        ]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts; skipped where this machine does not allow them."""
    made = Hosts()
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command here")
    try:
        made.plug()
    except subprocess.CalledProcessError as error:
        made.unplug()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield made
    made.unplug()


def both(hosts: Hosts, tmp_path: Path, work: list[Any], *, launcher: str = "torchrun") -> None:
    """Run to the end on both hosts."""
    logs = {host: tmp_path / f"{host}.log" for host in "AB"}
    commands = {h: hosts.torchrun(h) if launcher == "torchrun" else hosts.deepspeed(h, tmp_path) for h in "AB"}
    running = [hosts.start(host, *commands[host], work=work, log=logs[host]) for host in "AB"]
    codes = [process.wait(timeout=300) for process in running]
    assert codes == [0, 0], "\n".join(log.read_text(errors="replace")[-3000:] for log in logs.values())


def wait_for_steps(folder: Path, count: int) -> None:
    """Wait until a training has taken steps."""
    limit = time.monotonic() + 120
    while not (folder / "metrics.csv").exists() or len(curve(folder)) < count:
        assert time.monotonic() < limit, "the training did not begin"
        time.sleep(0.2)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_hosts_equal_one_process(hosts: Hosts, tmp_path: Path, launcher: str) -> None:
    work = [
        [str(tmp_path / f"{kind}-{stage}"), {"stage": stage, "kind": kind}]
        for kind in ("causal_lm", "medusa")
        for stage in (2, 3)
    ]
    both(hosts, tmp_path, work, launcher=launcher)
    for folder, layout in work:
        alone = run(tmp_path / "alone" / Path(folder).name, kind=layout["kind"])
        assert curve(Path(folder)) == pytest.approx(alone, abs=1e-5), folder


def test_a_host_that_dies_ends_the_other_and_both_go_on_exactly(hosts: Hosts, tmp_path: Path) -> None:
    folder, logs = tmp_path / "run", {host: tmp_path / f"{host}.log" for host in "AB"}
    running = {
        host: hosts.start(host, *hosts.torchrun(host), work=[[str(folder), SLOW]], log=logs[host]) for host in "AB"
    }
    wait_for_steps(folder, 5)
    hosts.kill("B")
    killed = time.monotonic()
    assert running["A"].wait(timeout=60) != 0
    assert time.monotonic() - killed < 30
    said = logs["A"].read_text(errors="replace")
    assert all(words in said for words in ("rank 1 on", "is gone", "after step")), said[-3000:]
    done = len(curve(folder))
    hosts.port += 1
    both(hosts, tmp_path, [[str(folder), {"stage": 2, "steps": done + 2}]])
    assert curve(folder) == pytest.approx(run(tmp_path / "alone", steps=done + 2), abs=1e-5)


def test_a_cut_cable_is_an_error_within_the_timeout(hosts: Hosts, tmp_path: Path) -> None:
    timeout, folder, logs = 15.0, tmp_path / "run", {host: tmp_path / f"{host}.log" for host in "AB"}
    running = {
        host: hosts.start(host, *hosts.torchrun(host), work=[[str(folder), SLOW]], log=logs[host], timeout=timeout)
        for host in "AB"
    }
    wait_for_steps(folder, 5)
    hosts.cut()
    cut = time.monotonic()
    assert running["A"].wait(timeout=90) != 0
    assert time.monotonic() - cut < timeout + 30
    said = logs["A"].read_text(errors="replace")
    assert "rank 1 on" in said, said[-3000:]
    assert "is gone" in said or "not heard of" in said, said[-3000:]
