"""Settings of DeepSpeed and the configuration made from them; imports neither lightning nor deepspeed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from drafttrain.core.errors import RecipeError
from drafttrain.core.settings import setting

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.records_per_device",
    "gradient_accumulation_steps": "train.batch_size and train.records_per_device",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "checkpoint": "train.checkpoint_every_steps",
}
"""Keys of a DeepSpeed file that the recipe sets, and where."""


@dataclass
class DeepSpeedSettings:
    """How training state is partitioned over processes; an empty section is ZeRO-2."""

    stage: Literal[0, 1, 2, 3] = setting(
        2, help="ZeRO: 0 partitions nothing, 1 optimizer states, 2 also gradients, 3 also weights."
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = setting(
        "none", help="Where optimizer states are stored; cpu and nvme build an operator the first time (minutes)."
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = setting(
        "none", help="Where weights are stored; needs stage 3."
    )
    nvme_path: str | None = setting(None, help="Folder on a fast disk for offloading to nvme.")
    config: str | None = setting(
        None, help="A DeepSpeed JSON file in place of the keys above; it must not hold keys that the recipe sets."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if self.offload_optimizer != "none" and self.stage == 0:
            problems.append(f"offload_optimizer: {self.offload_optimizer} needs stage 1, 2 or 3, got 0")
        if self.offload_parameters != "none" and self.stage != 3:
            problems.append(f"offload_parameters: {self.offload_parameters} needs stage 3, got {self.stage}")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            problems.append(f"offload_optimizer: nvme needs stage 3, got {self.stage}")
        nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if nvme and self.nvme_path is None:
            problems.append("nvme_path: null, but something is offloaded to nvme: name a folder on that disk")
        if self.config is not None and self._changed_keys():
            problems.append(
                f"config: {self.config} takes the place of {', '.join(self._changed_keys())}: leave them out"
            )
        return [*problems, *self._file_problems()]

    def _changed_keys(self) -> list[str]:
        default = DeepSpeedSettings()
        names = ("stage", "offload_optimizer", "offload_parameters", "nvme_path")
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def _file_problems(self) -> Iterator[str]:
        if self.config is None:
            return
        try:
            content = read_config(self.config)
        except RecipeError as error:
            yield from error.problems
            return
        for key, ours in OWNED.items():
            if key in content:
                yield f"config: {self.config}: {key}: the recipe sets this, in {ours}: remove it from the file"
        if _zero_of(content).get("round_robin_gradients"):
            yield (
                f"config: {self.config}: zero_optimization.round_robin_gradients: with it DeepSpeed reports wrong places of parameters, and "
                "checkpoints would hold others in their place: remove it from the file"
            )
        stage = _zero_of(content).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            yield f"config: {self.config}: zero_optimization.stage: {stage!r} is none of 0, 1, 2, 3"

    @property
    def zero_stage(self) -> int:
        """The stage, from the file if there is one."""
        return self.stage if self.config is None else int(_zero_of(read_config(self.config)).get("stage", 0))

    @property
    def offloads(self) -> bool:
        """Whether optimizer states leave the device."""
        if self.config is None:
            return self.offload_optimizer != "none"
        return _zero_of(read_config(self.config)).get("offload_optimizer", {}).get("device", "none") != "none"

    def configuration(self) -> dict[str, Any]:
        """Return DeepSpeed's own configuration, without keys that the recipe sets elsewhere."""
        if self.config is not None:
            return {"zero_allow_untested_optimizer": True, "steps_per_print": None} | read_config(self.config)
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload_optimizer != "none":
            zero["offload_optimizer"] = self._device(self.offload_optimizer)
        if self.offload_parameters != "none":
            zero["offload_param"] = self._device(self.offload_parameters)
        return {"zero_allow_untested_optimizer": True, "steps_per_print": None, "zero_optimization": zero}

    def _device(self, device: str) -> dict[str, Any]:
        return {"device": device} | ({"nvme_path": self.nvme_path} if device == "nvme" else {})


def read_config(path: str) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON file.

    Raises:
        RecipeError: It cannot be read, or is not an object.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError("train.deepspeed", [f"config: {path}: cannot be read: {error}"]) from error
    if not isinstance(content, dict):
        raise RecipeError("train.deepspeed", [f"config: {path}: must hold one JSON object"])
    return content


def _zero_of(content: Mapping[str, Any]) -> dict[str, Any]:
    zero = content.get("zero_optimization", {})
    return zero if isinstance(zero, dict) else {}
