"""Settings of training; imports neither lightning nor deepspeed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import ClassVar, Literal

from drafttrain.core.settings import setting
from drafttrain.data_gen.sampler import num_micro_batches
from drafttrain.training.deepspeed_settings import DeepSpeedSettings


@dataclass
class PretrainSettings:
    """Phase 1 of Direct Alignment: cross-entropy on the plain sources, without the target's own texts."""

    max_steps: int = setting(1500, help="Optimizer steps.", ge=1)
    batch_size: int = setting(32, help="Records per optimizer step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate.", gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = setting("wsd", help="As train.schedule.")
    warmup_steps: int = setting(50, help="Steps of linear warm-up.", ge=0)
    weight_decay: float = setting(0.05, help="Decoupled weight decay of matrices.", ge=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.warmup_steps > self.max_steps:
            return [f"warmup_steps: {self.warmup_steps} is more than max_steps {self.max_steps}"]
        return []

    def smoke(self) -> "PretrainSettings":
        """Return a copy that takes a handful of steps."""
        return replace(
            self,
            max_steps=min(self.max_steps, 5),
            batch_size=min(self.batch_size, 8),
            warmup_steps=min(self.warmup_steps, 2),
        )


@dataclass
class TrainSettings:
    """How the drafter is trained."""

    pretrain: PretrainSettings | None = setting(
        None,
        help="Pretrain the drafter on the plain sources first; other settings are those of train. null: no pretraining.",
    )

    max_steps: int = setting(1000, help="Optimizer steps.", ge=1)
    batch_size: int = setting(
        32, help="Records (for a head, labelled tokens) per optimizer step, over all devices and micro-batches.", ge=1
    )
    records_per_device: int | None = setting(
        None,
        help="Largest number of records in one micro-batch on one device. A step has the fewest micro-batches that hold train.batch_size; "
        "its result does not depend on them. null: a device's share of a step is one micro-batch.",
        ge=1,
    )
    optimizer: Literal["adamw", "muon", "sgd"] = setting(
        "adamw",
        help="adamw; muon: Muon on hidden matrices, AdamW on embeddings, head and vectors; sgd: without momentum.",
    )
    lr: float = setting(1e-3, help="Peak learning rate.", gt=0)
    betas: list[float] = setting([0.9, 0.95], help="AdamW's two decay rates.", ge=0, lt=1)
    weight_decay: float = setting(0.0, help="Decoupled weight decay of matrices.", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", help="cosine, wsd (warm-up, stable, decay) or constant; all after the warm-up."
    )
    warmup_steps: int = setting(20, help="Steps of linear warm-up.", ge=0)
    decay_fraction: float = setting(0.2, help="wsd: share of the steps over which the rate falls.", gt=0, le=1)
    min_lr_ratio: float = setting(0.05, help="Final learning rate as a share of the peak.", ge=0, le=1)
    clip_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0: not clipped.", ge=0)
    precision: Literal["auto", "fp32", "bf16-mixed"] = setting(
        "auto",
        help="fp32, or bf16-mixed: autocast, fp32 weights. auto: bf16-mixed for a drafter on CUDA, and on a CPU if the target "
        "is in bfloat16 and such products are measured to be faster; else fp32. A run keeps the value that it started with.",
    )
    tf32: bool | None = setting(
        None,
        help="Multiply float32 matrices in TF32 in training on CUDA: a mantissa of 10 bits, about 7 times as fast. The evaluation "
        "never uses TF32. null: true; a run keeps the value that it started with.",
    )
    loss_chunk_rows: int | None = setting(
        None, help="Rows of logits that exist at once; null: as many as fit into 256 MiB, on a CPU 24 MiB.", ge=1
    )
    log_every_steps: int = setting(
        10,
        help="Steps between two rows of metrics.csv: the mean loss since the last one, the acceptance rate of that step.",
        ge=1,
    )
    profile_steps: list[int] | None = setting(
        None,
        help="First and last step to trace with torch.profiler, for example [20, 22]; null: none.",
        ge=1,
    )
    peak_tflops: float | None = setting(
        None,
        help="Dense 16-bit TFLOP/s of one device, for the utilization (mfu) in metrics.csv; null: from the GPU's name.",
        gt=0,
    )
    eval_every_steps: int = setting(
        100, help="Steps between two estimates of block efficiency on held-out prompts; 0: never.", ge=0
    )
    keep_best: int = setting(
        1, help="Number of best validated steps whose weights are kept; the best one is exported.", ge=1
    )
    eval_prompts: int = setting(32, help="Held-out prompts for these estimates.", ge=1)
    checkpoint_every_steps: int = setting(200, help="Steps between two checkpoints.", ge=1)
    keep_checkpoints: int = setting(
        2, help="Number of last checkpoints that are kept: up to 12 bytes a trained parameter each.", ge=1
    )
    loggers: list[str] = setting(
        ["csv", "tensorboard"], help="Any of csv, tensorboard, wandb, mlflow (the last two must be installed)."
    )
    activation_checkpointing: bool = setting(
        False, help="Compute the drafter's activations again in the backward pass instead of storing them."
    )
    compile: bool = setting(
        False,
        help="Compile the drafter and the loss with torch.compile: faster steps after some minutes of compiling; the result is the same.",
    )
    num_threads: int | None = setting(None, help="CPU threads of torch; null: torch's own choice.", ge=1)
    devices: int | None = setting(
        None, help="Processes to start on this machine, one per device; null: one per CUDA device, or one.", ge=1
    )
    device: str = setting(
        "auto", help="Device of the drafter with one process: cpu, cuda, cuda:1 ...; auto: that of the target."
    )
    deepspeed: DeepSpeedSettings | None = setting(
        None,
        help="Train under DeepSpeed, for example {stage: 2}; null: only with several processes, with stage 0.",
    )
    target_placement: Literal["replicated", "sharded", "absent"] = setting(
        "replicated",
        help="The target's weights. replicated: whole on every process; sharded: its blocks are partitioned over the "
        "processes by ZeRO-3; absent: not loaded once data.cache stores its outputs. The result does not depend on it.",
    )
    timeout_seconds: float = setting(600.0, help="Time that a process waits for the others before the run fails.", gt=0)
    max_skipped_steps: int = setting(
        10,
        help="Number of successive steps with a gradient that is not finite, all skipped, before the run fails.",
        ge=0,
    )

    on_full_disk: Literal["stop", "continue"] = setting(
        "stop",
        help="If the disk has no room for a checkpoint or the best weights: stop, or continue with the previous ones.",
    )
    max_restarts: int = setting(
        0, help="How often the processes of train.devices are restarted after one of them died.", ge=0
    )

    LOGGERS: ClassVar[tuple[str, ...]] = ("csv", "tensorboard", "wandb", "mlflow")
    REPLACED: ClassVar[Mapping[str, str]] = {
        "accumulation": "records_per_device, which is batch_size / (devices x accumulation)"
    }

    def largest_micro_batch(self, world_size: int) -> int:
        """Return the largest number of records that a device reads at once."""
        own = -(-self.batch_size // world_size)
        return -(-own // self.num_micro_batches(world_size))

    def num_micro_batches(self, world_size: int) -> int:
        """Return how many micro-batches an optimizer step has on each device."""
        return num_micro_batches(self.batch_size, records_per_device=self.records_per_device, world_size=world_size)

    def on(self, device_type: str, *, head: bool = False) -> "TrainSettings":
        """Return a copy in which `precision: auto` is resolved for a kind of device, for a drafter or a head."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16-mixed" if device_type == "cuda" and not head else "fp32")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 0 without DeepSpeed."""
        return 0 if self.deepspeed is None else self.deepspeed.zero_stage

    def without_layout(self) -> "TrainSettings":
        """Return a copy without the settings of layout and logging, on which the trained weights do not depend."""
        return replace(
            self,
            records_per_device=None,
            devices=None,
            device="auto",
            deepspeed=None,
            target_placement="replicated",
            timeout_seconds=600.0,
            num_threads=None,
            profile_steps=None,
            peak_tflops=None,
            compile=False,
            loggers=[],
            keep_best=1,
            keep_checkpoints=2,
            on_full_disk="stop",
            max_restarts=0,
        )

    def of_pretraining(self) -> "TrainSettings":
        """Return the settings of phase 1: no target, so nothing to validate against."""
        assert self.pretrain is not None
        return replace(self, **asdict(self.pretrain), pretrain=None, eval_every_steps=0, profile_steps=None)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps: {self.warmup_steps} is more than max_steps {self.max_steps}")
        if self.profile_steps is not None and not (
            len(self.profile_steps) == 2 and self.profile_steps[0] <= self.profile_steps[1] <= self.max_steps
        ):
            problems.append(
                f"profile_steps: first and last step, of 1..{self.max_steps} (max_steps), got {self.profile_steps}"
            )
        if len(self.betas) != 2:
            problems.append(f"betas: two numbers are needed, got {self.betas}")
        if self.device != "auto" and (self.devices or 1) > 1:
            problems.append(f"device: {self.device} is one device, for {self.devices} processes: leave it at auto")
        if self.compile and self.zero_stage == 3:
            problems.append(
                "compile: does not work with weights that are partitioned over processes (deepspeed stage 3): use stage 0, 1 or 2"
            )
        if self.deepspeed is not None and self.deepspeed.offloads and self.optimizer != "adamw":
            problems.append(f"optimizer: {self.optimizer} does not work with offloaded states: use adamw")
        for name in self.loggers:
            if name not in self.LOGGERS:
                problems.append(f"loggers: unknown logger {name!r}. Available: {', '.join(self.LOGGERS)}")
            elif name != "csv" and find_spec(name) is None:
                problems.append(f"loggers: {name!r} is not installed: pip install {name}, or leave it out")
        return problems

    def smoke(self) -> "TrainSettings":
        """Return a copy that takes at most 20 steps and runs every part of training."""
        return replace(
            self,
            max_steps=min(self.max_steps, 20),
            batch_size=min(self.batch_size, 8),
            warmup_steps=min(self.warmup_steps, 5),
            eval_every_steps=10 if self.eval_every_steps else 0,
            eval_prompts=min(self.eval_prompts, 4),
            checkpoint_every_steps=10,
            log_every_steps=5,
            profile_steps=self.profile_steps if max(self.profile_steps or [0]) <= 20 else None,
        )
