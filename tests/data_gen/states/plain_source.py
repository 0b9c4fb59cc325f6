"""A source of hidden states for tests: the target by plain transformers in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.settings import setting
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.states import states
from drafttrain.data_gen.states.builtin import BuiltinSource, BuiltinStates
from drafttrain.data_gen.states.engine_target import EngineTarget
from drafttrain.data_gen.states.process_engine import ProcessEngine
from drafttrain.environments.environment import Environment
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget, target_folder

WORKER = Path(__file__).with_name("plain_worker.py")
KIND = "plain"


@dataclass
class PlainStates:
    """Plain transformers in a process of its own, in drafttrain's own Python."""

    faults: str = setting("", help="A file with the number of layers that the states are off by.")


class PlainSource:
    """The target's blocks are in another process."""

    elsewhere = True

    def __init__(self, settings: PlainStates) -> None:
        self.settings = settings

    def target(self, settings: TargetSettings, *, max_length: int, while_training: bool) -> AbsentTarget:
        """Return a target whose blocks run in the worker."""
        target = AbsentTarget.load(settings)
        dtype = str(target.model.dtype).removeprefix("torch.")
        request = {"target": str(target_folder(settings)), "dtype": dtype, "faults": self.settings.faults}
        engine = ProcessEngine(Environment("transformers"), WORKER, request, max_length=max_length)
        return EngineTarget(target, settings, engine, while_training=while_training)

    def continued(self, tasks: Sequence[Task], target: Target, **limits: Any) -> list[list[int]]:
        """Return the continuations by the whole target."""
        whole = Target.load(TargetSettings(model=target.name))
        return BuiltinSource(BuiltinStates()).continued(tasks, whole, **limits)


@contextmanager
def registered() -> Iterator[str]:
    """Within this context recipes may name the source; yield its kind."""
    states.register(KIND, PlainStates)(PlainSource)
    try:
        yield KIND
    finally:
        states._entries.pop(KIND)
