"""Low-rank adapters beside frozen linear layers: applied by hooks during a forward, merged into the weights at the end.

Of Medusa-2 they are in the target; of a drafter that starts from trained weights, in the drafter itself.

R = rank, I = inputs, O = outputs of a linear layer, B = sequences, T = positions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting
from drafttrain.losses.random_rows import chosen


@dataclass
class LoraSettings:
    """Low-rank adapters beside linear layers, which stay frozen with everything else."""

    rank: int = setting(32, help="Rank of an adapter.", ge=1)
    alpha: float = setting(16.0, help="An adapter's output is multiplied by alpha / rank.", gt=0)
    dropout: float = setting(
        0.0,
        help="Dropout on an adapter's inputs. The choice depends only on step, document and position.",
        ge=0,
        lt=1,
    )
    target_modules: list[str] = setting(
        ["q_proj", "v_proj"], help="Linear layers of every block that get an adapter, by the last part of their name."
    )
    whole_modules: list[str] = setting(
        [],
        help="Parts of the drafter that are trained whole beside the adapters, by the last part of their name, such as norm or "
        "embed_tokens.",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [] if self.target_modules else ["target_modules: at least one name is needed"]
        if twice := sorted({*self.target_modules} & {*self.whole_modules}):
            problems.append(
                f"whole_modules: {', '.join(twice)} cannot be trained whole and have adapters: name one key"
            )
        return problems


LORA_HELP = (
    "Train low-rank adapters beside the drafter's trained weights, which stay frozen; the export holds merged weights. "
    "null: all weights are trained."
)


def lora_problems(lora: LoraSettings | None, *, starts_from: str | None, has_dropout: bool = False) -> list[str]:
    """Return why adapters cannot be trained beside a drafter.

    Args:
        starts_from: Where its trained weights come from; None: it starts from random ones.
        has_dropout: Each of its linear layers reads every token exactly once, which dropout depends on.
    """
    if lora is None:
        return []
    problems = []
    if starts_from is None:
        problems.append("lora: adapters need trained weights beside them, and this drafter starts from random ones")
    if lora.dropout and not has_dropout:
        problems.append(
            "lora.dropout: this kind computes only the slots that its loss needs, or some of them again: set it to 0"
        )
    return problems


class LowRank(nn.Module):
    """The adapter of one linear layer. A module of its own, so that ZeRO-3 gathers its weights when they are used."""

    def __init__(self, settings: LoraSettings, linear: nn.Linear) -> None:
        super().__init__()
        # From the layer's sizes: ZeRO-3 may have partitioned its weight.
        down_RI = torch.empty(settings.rank, linear.in_features)
        nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        device = linear.weight.device
        self.down = nn.Parameter(down_RI.to(device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, settings.rank, device=device))
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

    def merged_into(self, weight_OI: Tensor) -> Tensor:
        """Return a layer's weight with this adapter added, in the weight's type."""
        return added_to(weight_OI, self.down.detach(), self.up.detach(), scale=self.scale)


def added_to(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, *, scale: float) -> Tensor:
    """Return weight_OI + scale * up_OR down_RI, computed in float32 or wider, in the weight's type."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    added_OI = scale * (up_OR.to(weight_OI.device, wide) @ down_RI.to(weight_OI.device, wide))
    return (weight_OI.to(wide) + added_OI).to(weight_OI.dtype)


class LoraAdapter(nn.Module):
    """Adapters W x + (alpha / rank) B A x; B starts at zero. The modules and weights beside them stay as they are.

    Args:
        linears: The layers that may get one, by their full name.
        key: Where the settings are in the recipe, for errors.

    Raises:
        CheckpointError: A name of `target_modules` is that of no layer.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """

    def __init__(self, settings: LoraSettings, linears: Mapping[str, nn.Linear], *, key: str = "drafter.lora") -> None:
        super().__init__()
        self.settings = settings
        self.names = [name for name in linears if _last(name) in settings.target_modules]
        self._key = key
        if missing := [one for one in settings.target_modules if all(_last(name) != one for name in self.names)]:
            raise CheckpointError(
                f"{key}.target_modules: no linear layer that can have an adapter is called {', '.join(missing)}. "
                f"There is {', '.join(sorted({_last(name) for name in linears})) or 'none'}"
            )
        self.maps = nn.ModuleList(LowRank(settings, linears[name]) for name in self.names)
        self.on = False
        """The hooks are installed now."""
        self._seed_BT: Tensor | None = None
        self._handles: list[Any] = []

    @property
    def changes_something(self) -> bool:
        """Some adapter is not zero."""
        return any(bool(one.get_parameter("up").any()) for one in self.maps)

    @contextmanager
    def applied(self, model: nn.Module, *, seed_BT: Tensor | None = None) -> Iterator[None]:
        """Within this context the model's linear layers have their adapters.

        Args:
            seed_BT: A seed per token, in the layout that the model reads, for dropout; None: no dropout.
        """
        self.draw(seed_BT)
        self.turn_on(model)
        try:
            yield
        finally:
            self.turn_off()
            self.draw(None)

    def draw(self, seed_BT: Tensor | None) -> None:
        """Set the seeds of the forwards that follow, those of recomputed activations included; None: no dropout."""
        self._seed_BT = seed_BT if self.settings.dropout else None

    def turn_on(self, model: nn.Module) -> None:
        """Add the adapters' outputs to those of the model's linear layers from now on."""
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(index)) for index, name in enumerate(self.names)
        ]
        self.on = True

    def turn_off(self) -> None:
        """Undo `turn_on`."""
        self.on = False
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def merged(self, model: nn.Module) -> Iterator[None]:
        """Within this context the layers have no adapters, but weights with the adapters merged in."""
        layers = [model.get_submodule(name) for name in self.names]
        before = [layer.get_parameter("weight").data for layer in layers]
        self.turn_off()
        try:
            for layer, weight_OI, one in zip(layers, before, self._each(), strict=True):
                layer.get_parameter("weight").data = one.merged_into(weight_OI)
            yield
        finally:
            for layer, weight_OI in zip(layers, before, strict=True):
                layer.get_parameter("weight").data = weight_OI
            self.turn_on(model)

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (down_RI, up_OR) by the full name of the layer."""
        return {name: (one.down.detach(), one.up.detach()) for name, one in zip(self.names, self._each(), strict=True)}

    def _each(self) -> Sequence[LowRank]:
        return [one for one in self.maps if isinstance(one, LowRank)]

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
                f"{self._key}.dropout: {self.names[index]} does not read every token exactly once, so dropout cannot "
                "depend on the token's position: set it to 0, or remove that layer from target_modules"
            )
        return self._seed_BT.to(inputs.device) * 1_000_003 + index


def linears_in(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def modules_named(model: nn.Module, wanted: Sequence[str], *, key: str) -> list[nn.Module]:
    """Return the modules with weights whose names end in one of the wanted ones.

    Raises:
        CheckpointError: There is none of a name.
    """
    known = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    if missing := [one for one in wanted if all(_last(name) != one for name in known)]:
        raise CheckpointError(
            f"{key}: this drafter has no part called {', '.join(missing)}. It has {', '.join(sorted({*map(_last, known)}))}"
        )
    return [module for name, module in known.items() if _last(name) in wanted]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
