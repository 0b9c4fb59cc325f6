"""Hidden states by vLLM in its own environment: the target's blocks are loaded there, over several GPUs if it needs them.

`drafttrain engines install vllm` creates the environment for CPUs, `vllm-cuda` the one for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from drafttrain.core.settings import setting
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.vllm import Vllm, VllmSettings, environment_on
from drafttrain.data_gen.states import states
from drafttrain.data_gen.states.engine_target import EngineTarget
from drafttrain.data_gen.states.engine_texts import continued_by
from drafttrain.data_gen.states.process_engine import ProcessEngine
from drafttrain.target_model import Target
from drafttrain.target_model.absent_target import AbsentTarget, target_folder
from drafttrain.target_model.settings import TargetSettings

WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class VllmStates:
    """vLLM computes them in its own process, and loads the target there."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, help="Type of the weights in the engine; null: the target's."
    )
    memory_gb: float = setting(
        4.0, help="Size of the engine's cache of keys, values and states; on a CPU rounded up to whole gigabytes.", gt=0
    )
    batch_size: int = setting(64, help="Texts read together.", ge=1)
    tensor_parallel_size: int = setting(1, help="GPUs that share the target's weights.", ge=1)

    def smoke(self) -> VllmStates:
        """Return a copy that needs little memory."""
        return replace(self, memory_gb=min(self.memory_gb, 1.0), batch_size=min(self.batch_size, 16))


@states.register("vllm", VllmStates)
class VllmSource:
    """The target's blocks are in vLLM."""

    elsewhere = True

    def __init__(self, settings: VllmStates) -> None:
        self.settings = settings

    def target(self, settings: TargetSettings, *, max_length: int, while_training: bool) -> AbsentTarget:
        """Return a target whose blocks run in vLLM."""
        target, own = AbsentTarget.load(settings), self.settings
        device = target.device.type
        request = {
            "target": str(target_folder(settings).resolve()),
            "dtype": own.dtype or str(target.model.dtype).removeprefix("torch."),
            "max_num_seqs": own.batch_size,
            "memory_gb": own.memory_gb,
            "tensor_parallel_size": own.tensor_parallel_size,
            "on_cuda": device == "cuda",
        }
        engine = ProcessEngine(environment_on(device), WORKER, request, max_length=max_length)
        return EngineTarget(target, settings, engine, while_training=while_training)

    def continued(
        self,
        tasks: Sequence[Task],
        target: Target,
        *,
        max_new_tokens: int,
        seed: int,
        written: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the target's continuations by vLLM, in another process than the states."""
        own = self.settings
        # Two engines would hold the target's weights at once; that of the states starts again when it is asked.
        target.release()
        settings = VllmSettings(dtype=own.dtype, memory_gb=own.memory_gb, tensor_parallel_size=own.tensor_parallel_size)
        return continued_by(
            lambda plan: Vllm(settings, plan),
            tasks,
            target,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=self.settings.batch_size,
            written=written,
        )
