"""DeepSpeed under Lightning: one strategy for GPUs and, over gloo, for CPUs, with fixes where the two do not fit together."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from drafttrain.distributed.world import World
from drafttrain.training.checkpoint_file import CheckpointFile, on_host
from drafttrain.training.settings import TrainSettings
from drafttrain.training.zero_state import give_shares, load_optimizer_state, load_weights, optimizer_state, weights

# DeepSpeed calls torch's collectives by their deprecated names.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's engine and ZeRO optimizers, on any device; checkpoints have the format of a run without DeepSpeed."""

    def __init__(self, settings: TrainSettings, *, device: torch.device, here: World) -> None:
        config: dict[str, Any] = (
            settings.deepspeed.configuration() if settings.deepspeed else {"zero_allow_untested_optimizer": True}
        )
        # Stage 0 has no ZeRO optimizer to clip and skip, so ZeroPrecision does.
        clip_norm = settings.clip_norm if settings.zero_stage else 0.0
        config |= {"gradient_clipping": clip_norm, "train_micro_batch_size_per_gpu": 1}
        if settings.precision == "bf16-mixed":
            # Lightning's bf16-mixed would convert the weights to bf16 too.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        super().__init__(
            config=config,
            timeout=timedelta(seconds=settings.timeout_seconds),
            cluster_environment=Launched(here),
            precision_plugin=ZeroPrecision(settings.clip_norm),
            process_group_backend="nccl" if device.type == "cuda" else "gloo",
            logging_level=logging.ERROR,
        )

    @property
    def root_device(self) -> torch.device:
        """The device of this process. DeepSpeed needs an index, even on a CPU."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Set up the device as the base class does on CUDA, also on a CPU."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the other processes; on a CPU do not build an operator that training never calls."""
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        _without_shared_memory_operator()
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _init_deepspeed_distributed(self) -> None:
        """Join as the base class does. A single process uses no port: a free one could be taken before it listens."""
        if self.world_size == 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                self._get_process_group_backend(),
                store=torch.distributed.HashStore(),
                rank=0,
                world_size=1,
                timeout=self._timeout,
            )
        super()._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        """Build the engine, register Muon's matrices, and set the recipe's timeout on all process groups, DeepSpeed's included."""
        super().init_deepspeed()
        module: Any = self.lightning_module
        give_shares(self.deepspeed_engine, module.groups)
        assert self._timeout is not None
        _bound_waits(self._timeout)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file that every layout can load, from the first process; all processes gather it."""
        module: Any = self.lightning_module
        own = {
            "state_dict": weights(module, keep=self.is_global_zero),
            "optimizer_states": [optimizer_state(self.deepspeed_engine, module.groups, keep=self.is_global_zero)],
        }
        if self.is_global_zero:
            assert isinstance(self.checkpoint_io, CheckpointFile)
            self.checkpoint_io.write(on_host({**checkpoint, **dict.fromkeys(own)}) | own, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the checkpoint on every process."""
        stored: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return stored

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights into the engine."""
        load_weights(self.deepspeed_engine, checkpoint["state_dict"])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether `load_optimizer_state_dict` is called."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state into the engine."""
        module: Any = self.lightning_module
        load_optimizer_state(self.deepspeed_engine, module.groups, checkpoint["optimizer_states"][0])


class ZeroPrecision(DeepSpeedPrecision):
    """Backward and step through DeepSpeed's engine, dividing by the accumulation once."""

    def __init__(self, clip_norm: float) -> None:
        super().__init__("32-true")
        self._clip_norm = clip_norm or float("inf")

    def convert_input(self, data: Any) -> Any:
        """Return the batch unchanged: the drafter chooses its own types."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass; Lightning has already divided the loss by the accumulation."""
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the micro-batch, then let the engine step at the end of the accumulation.

        ZeRO's optimizers skip a step whose gradient is not finite; stage 0 has no such optimizer, so it is done here.
        """
        closure()
        engine = model.trainer.model
        ends = engine.is_gradient_accumulation_boundary()
        skipped, norm = False, float("nan")
        if ends and not engine.zero_optimization():
            norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), self._clip_norm))
            skipped = not norm < float("inf")
            if skipped:
                # An optimizer does not change parameters without a gradient.
                engine.zero_grad()
        before = engine.skipped_steps
        result = engine.step(**kwargs)
        if ends:
            if engine.zero_optimization():
                norm, skipped = float(engine.get_global_grad_norm()), engine.skipped_steps > before
            model.stepped(norm, skipped=skipped)
        return result


class Launched(ClusterEnvironment):
    """The processes as numbered by the launcher: Lightning starts none itself."""

    def __init__(self, here: World) -> None:
        super().__init__()
        self._here = here

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        """Host of the first process."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Port of the first process; a single process does not listen."""
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        """Return False: this environment is always passed explicitly."""
        return False

    def world_size(self) -> int:
        """Return the number of processes."""
        return self._here.size

    def set_world_size(self, size: int) -> None:
        """Ignore it: the launcher has set it."""

    def global_rank(self) -> int:
        """Return the number of this process."""
        return self._here.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignore it: the launcher has set it."""

    def local_rank(self) -> int:
        """Return the number of this process on its machine."""
        return self._here.local_rank

    def node_rank(self) -> int:
        """Return the number of this machine."""
        return self._here.rank // self._here.local_size


def _bound_waits(timeout: timedelta) -> None:
    """Set the timeout of every process group; DeepSpeed clones the first group with a timeout of half an hour."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def join_deepspeed() -> None:
    """Initialize DeepSpeed on the processes that have joined, before a trainer exists."""
    import deepspeed

    if not torch.cuda.is_available():
        _without_shared_memory_operator()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _without_shared_memory_operator() -> None:
    """Prevent DeepSpeed from building an operator that training never calls."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather the weights on every process inside the block if ZeRO-3 partitions them; all processes must enter."""
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield
