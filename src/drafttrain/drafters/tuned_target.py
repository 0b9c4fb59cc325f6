"""A target in training for its own drafts: adapters on it, or a trained copy of its weights; its files; the target that is served.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput, Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.settings import setting
from drafttrain.drafters.adapter_folder import merged, save_adapter
from drafttrain.drafters.lora import LoraAdapter, LoraSettings, linears_in
from drafttrain.losses.forward_kl import ForwardKL, ForwardKLSettings
from drafttrain.target_model import Target
from drafttrain.target_model.documents import as_read, document_states
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.logits import LiveRows, finisher, head_of
from drafttrain.target_model.matrix_products import trunk_products

ADAPTER = "adapter"
"""Folder of the adapters inside a drafter folder, in peft's format. The drafter works only on the target with these adapters."""
WHOLE = "target"
"""Folder of the whole tuned target inside a drafter folder, where all its weights were trained."""


@dataclass
class TuningSettings:
    """How the target is tuned: by adapters, or in all its weights."""

    lora: LoraSettings | None = setting(
        LoraSettings(),
        help="Low-rank adapters on the target, which stays frozen; null: all weights of a copy are trained.",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return target_lora_problems(self.lora)


def target_lora_problems(lora: LoraSettings | None) -> list[str]:
    """Return what adapters on a target cannot have."""
    if lora is not None and lora.whole_modules:
        return ["lora.whole_modules: the target's own weights stay frozen: leave it out"]
    return []


class TrainedCopy(nn.Module):
    """A trained copy of all weights of a model, in float32 or wider. The model's own weights stay as they are.

    Tied weights are copied once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.on = False
        """The model computes with the copy now."""
        self._places: list[tuple[str, str, int]] = []
        self.weights = nn.ParameterList()
        number_of: dict[int, int] = {}
        for full_name, own in model.named_parameters(remove_duplicate=False):
            if id(own) not in number_of:
                number_of[id(own)] = len(self.weights)
                wide = torch.promote_types(own.dtype, torch.float32)
                self.weights.append(nn.Parameter(own.detach().to(wide, copy=True)))
            module, _, name = full_name.rpartition(".")
            self._places.append((module, name, number_of[id(own)]))

    @property
    def changes_something(self) -> bool:
        """True: whether the copy differs from the model is not compared."""
        return True

    @contextmanager
    def applied(self, model: nn.Module, *, seed_BT: Tensor | None = None) -> Iterator[None]:
        """Within this context the model computes with the copy, and gradients reach it.

        Args:
            seed_BT: Not used: there is no dropout.
        """
        holders = [(model.get_submodule(module), name, index) for module, name, index in self._places]
        before = [holder.get_parameter(name) for holder, name, _ in holders]
        try:
            for holder, name, index in holders:
                setattr(holder, name, self.weights[index])
            self.on = True
            yield
        finally:
            self.on = False
            for (holder, name, _), own in zip(holders, before, strict=True):
                setattr(holder, name, own)

    def of(self, module_name: str, name: str) -> nn.Parameter:
        """Return the copy of a module's weight."""
        found: nn.Parameter = self.weights[
            next(index for *place, index in self._places if place == [module_name, name])
        ]
        return found


class TunedTarget:
    """A target and the weights that tune it; a drafter registers `weights` as a part of its own.

    Outside of `applied` and `read`, the target is the original: the frozen reference needs no second copy.

    Args:
        lora: Of the adapters; None: all weights are trained.
        key: Where `lora` is in the recipe, for errors.

    Raises:
        CheckpointError: There is no linear layer of a name, or the target cannot be tuned so.
    """

    def __init__(self, target: Target, lora: LoraSettings | None, *, key: str) -> None:
        self.target = target
        self.weights: LoraAdapter | TrainedCopy
        if lora is None:
            if getattr(target.model.config, "quantization_config", None) is not None:
                raise CheckpointError(
                    f"{key}: null trains all weights, and those of {target.name} are quantized: train adapters"
                )
            self.weights = TrainedCopy(target.model)
        else:
            head = target.model.get_output_embeddings()
            linears = {name: one for name, one in linears_in(target.model).items() if one is not head}
            self.weights = LoraAdapter(lora, linears, key=key)

    def applied(self) -> AbstractContextManager[None]:
        """Within this context the target has the weights in training, without dropout."""
        return self.weights.applied(self.target.model)

    def on(self, batch: DraftBatch) -> AbstractContextManager[None]:
        """Within this context the target has the weights in training, with dropout by the batch's tokens if these are training.

        Within `applied`, as in validation, the target is tuned already.
        """
        if self.weights.on:
            return nullcontext()
        model = self.target.model
        seed_BT = as_read(model, batch.seed_BT, batch.positions_BT) if self.weights.training else None
        return self.weights.applied(model, seed_BT=seed_BT)

    def read(self, batch: DraftBatch, *, hidden: tuple[int, ...] = ()) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Return (final_BTD, the requested residual streams by index) of the tuned target; gradients reach its weights."""
        model = self.target.model
        with self.on(batch):
            return document_states(
                model, batch.tokens_BT, batch.positions_BT, hidden=hidden, documents=batch.packed_documents
            )

    @functools.cached_property
    def head(self) -> Head:
        """The tuned target's head."""
        model = self.target.model
        if isinstance(self.weights, LoraAdapter):
            return head_of(model)
        own = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is own)
        head: Any = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None, device="meta")
        for part, _ in list(head.named_parameters()):
            setattr(head, part, self.weights.of(name, part))
        return LinearHead(lambda depth: head, after=finisher(model.config.get_text_config()))

    def divergence(self, final_BTD: Tensor, batch: DraftBatch) -> Beside:
        """Return the loss term KL(the original || the tuned target), from the tuned target's final states."""
        assert batch.target is not None
        rows = batch.target_rows
        if not isinstance(rows, LiveRows):
            # A cache may store only a part of the distribution.
            rows = self.target.rows_of(batch.target)
        return Beside(DraftOutput({1: final_BTD}, self.head, lag=0), ForwardKL(ForwardKLSettings()), rows)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of one forward and backward pass through the tuned blocks."""
        if isinstance(self.weights, LoraAdapter):
            yield from trunk_products(self.target.model, shape, gradients=1)
            yield matrix(parameters_of(self.weights), shape.positions, gradients=2)
        else:
            yield from trunk_products(self.target.model, shape, gradients=2)

    def save(self, folder: Path) -> None:
        """Write the tuning into a drafter folder: the adapters, if one is not zero, or the whole target."""
        if isinstance(self.weights, LoraAdapter):
            if self.weights.changes_something:
                save_adapter(self.weights, folder / ADAPTER, target=self.target.name)
            return
        model, dtype = self.target.model, self.target.model.dtype
        with self.applied():
            tensors = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder / WHOLE, state_dict=tensors)
        self.target.tokenizer.save_pretrained(folder / WHOLE)


def tuning_in(folder: Path) -> Path | None:
    """Return where a drafter folder holds what its target was tuned to; None: it is for the target as it is."""
    return next((folder / name for name in (ADAPTER, WHOLE) if (folder / name).is_dir()), None)


def tuned(target: Target, tuning: Path | None) -> Target:
    """Return a tuned copy of a target; without a tuning, the target itself.

    Args:
        tuning: What `tuning_in` returned.

    Raises:
        CheckpointError: The files are damaged, or of another target.
    """
    if tuning is None:
        return target
    if tuning.name == ADAPTER:
        return merged(target, tuning)
    own = target.model
    model = load_causal_lm(
        tuning, dtype=str(own.dtype).removeprefix("torch."), attention=own.config._attn_implementation
    ).to(target.device)
    if model.get_output_embeddings().weight.shape != own.get_output_embeddings().weight.shape:
        raise CheckpointError(
            f"{tuning}: its head has another shape than that of {target.name}: made for another target"
        )
    return Target(model, target.tokenizer, name=f"{target.name} tuned", fingerprint=target.fingerprint)
