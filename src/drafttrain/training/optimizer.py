"""AdamW, and Muon on hidden matrices with AdamW on the rest in one optimizer object; learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.training.offload import cpu_adam
from drafttrain.training.settings import TrainSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that drives singular values towards 1 in five steps (Jordan et al. 2024)."""


@dataclass(frozen=True)
class Share:
    """The part of a matrix that one process holds in ZeRO's flat parameter, which concatenates the parameters of a group."""

    shape: torch.Size
    """Shape of the matrix."""
    first: int
    """The first entry on this process; entries are counted row by row."""
    count: int
    """Number of entries on this process; may be 0."""
    at: int
    """Offset of these entries in the flat parameter."""
    group: Any
    """The process group that holds the matrix."""

    def gathered(self, flat: Tensor) -> Tensor:
        """Return the whole matrix, gathered from tensors like the flat parameter; all processes of the group must call it."""
        whole = flat.new_zeros(self.shape.numel())
        self.of(whole).copy_(self.within(flat))
        torch.distributed.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """Return this process's entries of the matrix."""
        return whole.flatten().narrow(0, self.first, self.count)

    def within(self, flat: Tensor) -> Tensor:
        """Return these entries in a tensor like the flat parameter."""
        return flat.narrow(0, self.at, self.count)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others, behind one state dict.

    Muon's update of a matrix is its momentum with all singular values made one, scaled by 0.2 sqrt(max(rows, columns)) so
    that it is as large as an AdamW update and one learning rate and one weight decay serve both. Where ZeRO spreads the matrices over
    processes, each update is gathered, and every process computes it whole and keeps its share.

    Source: Jordan et al. 2024, Muon; the scale: Liu et al. 2025, Muon is Scalable for LLM Training, arXiv 2502.16982, 2.2.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        orthogonalised_in: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "muon": False,
        }
        self._orthogonalised_in = orthogonalised_in
        super().__init__(groups, defaults)
        self.shares: dict[Tensor, Sequence[Share]] = {}
        """For each flat parameter, all matrices of its group, in the same order on all processes."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adamw_update
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update(parameter, group), alpha=-group["lr"])
        return loss

    def _muon_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(state["momentum"], group["momentum"])
        if parameter not in self.shares:
            return self._of_matrix(nesterov)
        update = torch.zeros_like(nesterov)
        for share in self.shares[parameter]:
            whole = share.gathered(nesterov)
            if share.count:
                share.within(update).copy_(share.of(self._of_matrix(whole)))
        return update

    def _of_matrix(self, momentum: Tensor) -> Tensor:
        return orthogonalised(momentum, self._orthogonalised_in).mul_(0.2 * math.sqrt(max(momentum.shape)))

    def _adamw_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return (state["exp_avg"] / (1 - beta1**step)).div_(scale)


def orthogonalised(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the matrix with its singular values driven to about one by five Newton-Schulz steps.

    Args:
        dtype: Type of the products; None: the matrix's.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (wide / (wide.norm() + 1e-7)).to(dtype or matrix.dtype)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype).contiguous()


def build_optimizer(
    module: nn.Module, settings: TrainSettings, *, lr_factor: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """Return the optimizer for the trainable parameters: matrices decay, vectors do not.

    Args:
        lr_factor: Factor on `lr` for the parameter of a name.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    heads = {id(parameter) for name, parameter in named if "head" in name or name.endswith("codebook")}
    matrices = [p for _, p in named if p.ndim == 2 and id(p) not in tables | heads]
    edges = [p for _, p in named if p.ndim >= 2 and not any(p is matrix for matrix in matrices)]
    vectors = [p for _, p in named if p.ndim < 2]
    betas = (settings.betas[0], settings.betas[1])
    groups: list[dict[str, Any]]
    if settings.optimizer == "muon":
        groups = [
            {"params": matrices, "muon": True},
            {"params": edges},
            {"params": vectors, "weight_decay": 0.0},
        ]
        chosen = _by_rate(groups, named, settings.lr, lr_factor)
        # As its authors do: the products are made for bfloat16, and cost up to a fifth of a step in float32 on a CPU.
        products = torch.bfloat16 if settings.precision == "bf16-mixed" else None
        return MuonAdamW(
            chosen, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, orthogonalised_in=products
        )
    groups = [{"params": matrices + edges}, {"params": vectors, "weight_decay": 0.0}]
    chosen = _by_rate(groups, named, settings.lr, lr_factor)
    if settings.deepspeed is not None and settings.deepspeed.offloads:
        return cpu_adam(chosen, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(chosen, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(chosen, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=True)


def state_bytes(module: nn.Module, settings: TrainSettings) -> int:
    """Return the bytes of the optimizer's state after its first step: two moments in the type of each parameter and a count of steps
    (AdamW), one moment (Muon), or none (SGD).
    """
    # Where the state is offloaded it has the same size, and its optimizer would have to be compiled.
    optimizer = build_optimizer(module, replace(settings, deepspeed=None))
    if isinstance(optimizer, torch.optim.SGD):
        return 0
    moments = 0
    for group in optimizer.param_groups:
        muon = group.get("muon", False)
        moments += sum(p.numel() * p.element_size() * (1 if muon else 2) + (0 if muon else 4) for p in group["params"])
    return moments


def _by_rate(
    groups: list[dict[str, Any]],
    named: list[tuple[str, nn.Parameter]],
    lr: float,
    lr_factor: Callable[[str], float],
) -> list[dict[str, Any]]:
    """Split groups by learning rate; empty groups are left out."""
    factors = {id(parameter): lr_factor(name) for name, parameter in named}
    parts = [
        group | {"params": [p for p in group["params"] if factors[id(p)] == factor], "lr": lr * factor}
        for group in groups
        for factor in dict.fromkeys(factors.values())
    ]
    return [part for part in parts if part["params"]]


def learning_rate_scale(step: int, settings: TrainSettings) -> float:
    """Return the factor on `lr` at an optimizer step: linear warm-up, then the schedule.

    Args:
        step: Steps taken so far.
        settings: `schedule` is constant, cosine, or wsd (warm-up, stable, then a linear decay over the last
            `decay_fraction` of the steps); both end at `min_lr_ratio`.
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    floor = settings.min_lr_ratio
    if settings.schedule == "cosine":
        length = max(1, settings.max_steps - settings.warmup_steps)
        share = min(1.0, (step - settings.warmup_steps) / length)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    if settings.schedule == "wsd":
        length = max(1, round(settings.max_steps * settings.decay_fraction))
        left = settings.max_steps - step
        return floor + (1 - floor) * min(1.0, max(0.0, left / length))
    return 1.0
