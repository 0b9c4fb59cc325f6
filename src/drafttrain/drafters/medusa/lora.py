"""Low-rank adapters on a frozen target: applied by hooks during a forward, stored in peft's format.

R = rank, I = inputs, O = outputs of a linear map
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import read_json
from drafttrain.core.settings import setting
from drafttrain.core.tensors import read_tensors
from drafttrain.losses.random_rows import chosen
from drafttrain.target_model import Target

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass
class LoraSettings:
    """Low-rank adapters on linear layers of the target."""

    rank: int = setting(32, help="Rank of an adapter.", ge=1)
    alpha: float = setting(16.0, help="An adapter's output is multiplied by alpha / rank.", gt=0)
    dropout: float = setting(
        0.05,
        help="Dropout on an adapter's inputs. The choice depends only on step, document and position.",
        ge=0,
        lt=1,
    )
    target_modules: list[str] = setting(
        ["q_proj", "v_proj"], help="Linear layers of every block that get an adapter, by the last part of their name."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return [] if self.target_modules else ["target_modules: at least one name is needed"]


class LowRank(nn.Module):
    """The adapter of one linear layer. A module of its own, so that ZeRO-3 gathers its weights when they are used."""

    def __init__(self, settings: LoraSettings, weight_OI: Tensor) -> None:
        super().__init__()
        down_RI = torch.empty(settings.rank, weight_OI.shape[1])
        nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        self.down = nn.Parameter(down_RI)
        self.up = nn.Parameter(torch.zeros(weight_OI.shape[0], settings.rank))
        self.dropout = settings.dropout
        self.scale = settings.alpha / settings.rank

    def forward(self, inputs: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Return what is added to the layer's output.

        Args:
            seeds: A seed per input row, which decides what dropout drops; None: no dropout.
        """
        inputs = inputs.to(self.down.dtype)
        if seeds is not None:
            dropped = chosen(seeds.flatten(), inputs.shape[-1], share=self.dropout).view(inputs.shape)
            inputs = inputs.masked_fill(dropped, 0.0) / (1 - self.dropout)
        added: Tensor = self.scale * (inputs @ self.down.T @ self.up.T)
        return added


class LoraAdapter(nn.Module):
    """Adapters W x + (alpha / rank) B A x; B starts at zero. The target's own modules and weights stay as they are.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """

    def __init__(self, settings: LoraSettings, model: Any) -> None:
        super().__init__()
        self.settings = settings
        self.names = _linear_names(model, settings.target_modules)
        self.maps = nn.ModuleList(LowRank(settings, model.get_submodule(name).weight) for name in self.names)
        self.on = False
        """The hooks are installed now."""
        self._seed_BT: Tensor | None = None

    @property
    def changes_something(self) -> bool:
        """Some adapter is not zero."""
        return any(bool(one.get_parameter("up").any()) for one in self.maps)

    @contextlib.contextmanager
    def applied(self, model: Any, *, seed_BT: Tensor | None = None) -> Iterator[None]:
        """Within this context the model's linear layers have their adapters.

        Args:
            seed_BT: A seed per token, in the layout that the model reads, for dropout; None: no dropout.
        """
        self._seed_BT = seed_BT if self.settings.dropout else None
        handles = [
            model.get_submodule(name).register_forward_hook(self._hook(index)) for index, name in enumerate(self.names)
        ]
        self.on = True
        try:
            yield
        finally:
            self.on, self._seed_BT = False, None
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            added: Tensor = self.maps[index](args[0], self._seeds(index, args[0]))
            return output + added.to(output.dtype)

        return add

    def _seeds(self, index: int, inputs: Tensor) -> Tensor | None:
        """Return a seed for each row that a layer reads; they differ between layers."""
        if self._seed_BT is None:
            return None
        if inputs.shape[:-1].numel() != self._seed_BT.numel():
            raise CheckpointError(
                f"drafter.joint.lora.dropout: {self.names[index]} does not read every token exactly once, so dropout cannot "
                "depend on the token's position: set it to 0, or remove that layer from target_modules"
            )
        return self._seed_BT.to(inputs.device) * 1_000_003 + index

    def save(self, folder: Path, *, target: str) -> None:
        """Write a folder that `PeftModel.from_pretrained` and serving engines load."""
        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": target,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": self.settings.dropout,
            "target_modules": list(self.settings.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_json(folder / CONFIG, config)
        tensors = {}
        for name, one in zip(self.names, self.maps, strict=True):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = one.get_parameter("down").detach().contiguous().cpu()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = one.get_parameter("up").detach().contiguous().cpu()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def merged(target: Target, folder: Path) -> Target:
    """Return a copy of a target whose weights have a folder's adapters merged in.

    Raises:
        CheckpointError: The adapters do not fit the target.
    """
    try:
        config = read_json(folder / CONFIG)
        tensors = read_tensors(folder / WEIGHTS)
        scale = config["lora_alpha"] / config["r"]
    except (CheckpointError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: cannot read an adapter: {error}") from error
    model = copy.deepcopy(target.model)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    for name in sorted(names):
        down_RI, up_OR = (tensors[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        try:
            weight_OI = model.get_submodule(name).weight
        except AttributeError as error:
            raise CheckpointError(
                f"{folder}: {target.name} has no {name}: the adapter was made for another target"
            ) from error
        if weight_OI.shape != (up_OR.shape[0], down_RI.shape[1]):
            raise CheckpointError(
                f"{folder}: {name} of {target.name} has another shape: the adapter was made for another target"
            )
        with torch.no_grad():
            wide = torch.promote_types(weight_OI.dtype, torch.float32)
            added_OI = scale * (up_OR.to(weight_OI.device, wide) @ down_RI.to(weight_OI.device, wide))
            weight_OI.copy_(weight_OI.to(wide) + added_OI)
    return Target(model, target.tokenizer, name=f"{target.name} with adapter", fingerprint=target.fingerprint)


def _linear_names(model: Any, wanted: list[str]) -> list[str]:
    """Return the full names of the linear layers whose names end in one of the wanted ones."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linear if name.rsplit(".", 1)[-1] in wanted]
    missing = [one for one in wanted if all(name.rsplit(".", 1)[-1] != one for name in chosen)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise CheckpointError(
            f"drafter.joint.lora.target_modules: this target has no linear layer called {', '.join(missing)}. "
            f"It has {', '.join(known)}"
        )
    return chosen
