"""A plugin with a loss that waits at the end of a step until it is let go: a run is stopped or killed there, however fast it is.

The environment names a folder (WAITS_IN). A process that has come so far makes a file `waiting-<rank>` in it, and goes on when
there is a file `go`; one that finds its mark there does not wait again.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from drafttrain.losses import losses
from drafttrain.losses.tvdpp import TVDPP, TVDPPSettings

STEP = 17
"""The step, of those that a process takes, at whose end it waits."""
PLUGIN = [f"plugins=[{__name__}]", "loss={kind: waits, scope: batch}"]


class WaitsSettings(TVDPPSettings):
    """As TVD++."""


@losses.register("waits", WaitsSettings)
class Waits(TVDPP):
    """TVD++, with a break."""

    def __init__(self, settings: WaitsSettings | None = None) -> None:
        super().__init__(settings)
        self._steps = 0

    def end_of_step(self) -> None:
        """Wait, if this is the step and nobody has waited here before."""
        super().end_of_step()
        self._steps += 1
        if self._steps != STEP or not (place := os.environ.get("WAITS_IN")):
            return
        mark = Path(place) / f"waiting-{os.environ.get('RANK', '0')}"
        if not mark.exists():
            mark.touch()
            while not (Path(place) / "go").exists():
                time.sleep(0.01)


def wait_for(place: Path, running: subprocess.Popen[bytes], *, ranks: int = 1) -> None:
    """Wait until so many processes of a command wait."""
    while len(list(place.glob("waiting-*"))) < ranks:
        assert running.poll() is None, "the command ended before its processes had come so far"
        time.sleep(0.01)


def release(place: Path) -> None:
    """Let them go on."""
    (place / "go").touch()
