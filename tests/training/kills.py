"""A life of a run: the same command again and again, killed at seeded moments, until it ends.

Everything of a run is killed at once, in whatever session it is: what it started inherits a mark in its environment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.distributed.world import without_launcher
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.training.metrics_log import TIMES

RECIPE = """
name: life
target: {{model: {target}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 128, num_heads: 2}}
loss: {{kind: tvdpp, scope: batch}}
data:
  max_length: 24
  cache: top_k
  cache_top_k: 8
  overlap_ngram: 40
  generate: {{num_records: 24, records_per_shard: 3, max_new_tokens: 12, prompt_tokens: 6,
             prompts: {{kind: jsonl, path: {prompts}}}}}
  sources: [{{kind: generated}}]
train: {{max_steps: 25, batch_size: 8, records_per_device: 2, warmup_steps: 2, log_every_steps: 4, eval_every_steps: 10,
        checkpoint_every_steps: 3, eval_prompts: 2, loggers: [csv]}}
eval: {{num_prompts: 2, max_new_tokens: 4, prompt_tokens: 6, speed_prompts: 0, temperatures: [0],
       prompts: {prompts}, validation_prompts: {prompts}}}
"""

STAGES = {
    "gen": ("data/generated/shard-*", 0.15),
    "cache": ("data/0-cache/*", 0.05),
    "step": ("checkpoints/step-*.ckpt", 0.4),
    "save": ("checkpoints/step-*", 0.02),
    "best": ("best/.step-*", 0.02),
    "export": ("train.json", 6.0),
}
"""By stage: the file that appears first, and within how many seconds after it the kill comes.

A checkpoint is half written for some milliseconds only: one that is whole when it is seen is followed by others.
"""


OF_EVALUATION = {"eval.json", "report.html", "drafter/README.md"}


def write_recipe(folder: Path, target: Path) -> Path:
    """Write the recipe of a short run through every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(6)))
    recipe = folder / "life.yaml"
    recipe.write_text(RECIPE.format(target=target, prompts=prompts))
    return recipe


def uninterrupted(recipe: Path, folder: Path) -> Path:
    """Return the folder of a run in this process, up to its drafter."""
    loaded = load_recipe(recipe)
    gen(loaded, folder)
    run = DrafterRun(loaded, folder)
    run.train()
    run.export_best()
    return folder


@dataclass
class Life:
    """One run folder and the command that fills it."""

    recipe: Path
    runs: Path
    overrides: Sequence[str] = ()
    launcher: Sequence[str] = ()
    """Words before `-m drafttrain`, in place of Python itself."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs / "life"

    @property
    def log(self) -> Path:
        """What the command said, every time."""
        return self.runs.with_suffix(".log")

    def start(self, **more: str) -> subprocess.Popen[bytes]:
        """Start the command, with more in its environment."""
        self.runs.mkdir(parents=True, exist_ok=True)
        environment = without_launcher(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TEST_LIFE": self.mark,
            **more,
        }
        launcher = self.launcher or [sys.executable]
        words = ["-m", "drafttrain", "fit", str(self.recipe), "--runs", str(self.runs), *self.overrides]
        with self.log.open("ab") as log:
            return subprocess.Popen([*launcher, *words], env=environment, stdout=log, stderr=subprocess.STDOUT)

    def end(self) -> None:
        """Run the command until it ends well."""
        code = self.start().wait(timeout=300)
        assert code == 0, self.said()

    def said(self) -> str:
        """Return the end of what was said."""
        return self.log.read_text(errors="replace")[-4000:]

    def processes(self, **environment: str) -> Iterator[int]:
        """Find the processes of this life, or those among them with these variables."""
        marks = [f"{name}={value}".encode() for name, value in ({"TEST_LIFE": self.mark} | environment).items()]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    held = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if all(mark in held for mark in marks):
                    yield int(entry.name)

    def kill_all(self, known: Sequence[int] = ()) -> None:
        """Kill every process; those that are known go at once."""
        left = list(known) or list(self.processes())
        while left:
            for process in left:
                kill(process)
            left = list(self.processes())

    def killed(self, stage: str, draws: random.Random) -> bool:
        """Run the command and kill it at a moment of a stage; return whether it was still at work."""
        pattern, within = STAGES[stage]
        before = set(self.folder.glob(pattern))
        running = self.start()
        known: list[int] = []
        looked = 0.0
        while running.poll() is None and not set(self.folder.glob(pattern)) - before:
            if time.monotonic() - looked > 0.5:
                known, looked = list(self.processes()), time.monotonic()
            time.sleep(0.001)
        time.sleep(draws.uniform(0, within))
        # The command itself first: it says how it ended, and it must not see what it started die.
        kill(running.pid)
        self.kill_all(known)
        code = running.wait()
        assert code in (0, -signal.SIGKILL), self.said()
        return code == -signal.SIGKILL


def kill(process: int) -> None:
    """Kill a process that may be gone."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the time that they took."""
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    names = lines[0].split(",")
    return [
        {name: value for name, value in zip(names, line.split(","), strict=True) if name not in TIMES}
        for line in lines[1:]
    ]


def files(folder: Path) -> set[str]:
    """Return the names of all files and folders of a run."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def differences(folder: Path, whole: Path, *, atol: float) -> list[str]:
    """Return in what a run differs from an uninterrupted one; what only an evaluation writes is nobody's matter here."""
    found = []
    ours, theirs = (load_file(one / "drafter" / "model.safetensors") for one in (folder, whole))
    for name, weight in theirs.items():
        if not torch.allclose(ours[name], weight, rtol=0, atol=atol):
            found.append(f"{name}: {(ours[name] - weight).abs().max():.1e}")
    if atol == 0 and rows(folder) != rows(whole):
        found.append("metrics.csv")
    losses = [[float(row["loss"] or "nan") for row in rows(one)] for one in (folder, whole)]
    if losses[0] != pytest.approx(losses[1], abs=atol, nan_ok=True):
        found.append(f"losses: {losses}")
    missing, left = files(whole) - files(folder), files(folder) - files(whole) - OF_EVALUATION
    if missing or left:
        found.append(f"files: {sorted(missing)} are missing, {sorted(left)} are left")
    return found
