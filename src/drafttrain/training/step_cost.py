"""Operations and memory of one micro-batch at its real sizes, counted on tensors without data.

It runs the project's own target, drafter and loss, forward and backward, under PyTorch's fake tensors, so that an 8 B model needs
neither memory nor a GPU. Times are not measured: operations are.

B = sequences, T = positions
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.flops import attention
from drafttrain.core.piece_size import counted_for
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import taps, trunk
from drafttrain.target_model.packed_forward import packed
from drafttrain.training.flops import distill_flops

ADAMW_BYTES = 8
"""Bytes per trained parameter: two moments in float32."""


@dataclass(frozen=True)
class Trained:
    """The parts of a training step, made of tensors without data."""

    drafter: Drafter
    loss: Loss
    target: Target
    vocab_size: int
    chunk_rows: int | None = None
    """As `train.loss_chunk_rows`."""


@dataclass(frozen=True)
class StepCost:
    """Operations and memory of one micro-batch, and the memory of weights and optimizer."""

    positions: int
    executed: int
    """Floating-point operations of the matrix products that are run."""
    needed: int
    """Operations that the arithmetic needs (`training.flops`)."""
    kept: int
    """Bytes that the drafter's forward stores for its backward pass, autocast's copies of weights included."""
    peak: int
    """Peak bytes beyond weights and the optimizer's moments: activations, gradients, logits."""
    target_bytes: int
    trained_bytes: int
    """Weights and AdamW's moments."""

    @property
    def memory(self) -> int:
        """Peak bytes. A GPU's context and the allocator's fragmentation, 1 to 2 GB, come on top."""
        return self.target_bytes + self.trained_bytes + self.peak

    def seconds(self, *, peak_flops: float, utilisation: float) -> float:
        """Return the time of the micro-batch on a device with this peak and this utilisation by needed operations."""
        return self.needed / (peak_flops * utilisation)


def step_cost(
    build: Callable[[], Trained],
    *,
    rows: int,
    width: int,
    prompt: int = 0,
    mixed: bool = True,
    device_type: str = "cuda",
) -> StepCost:
    """Count one micro-batch of full rows, one document each.

    Args:
        build: Called in a mode in which new tensors have no data.
        prompt: First tokens of each document that are not trained.
        mixed: Train under bf16 autocast.
        device_type: The device whose cost is counted; it decides how much exists at once.
    """
    records = [Record(str(row), [1] * width, [False] * prompt + [True] * (width - prompt)) for row in range(rows)]
    batch, _ = pack(records, width=width, weight_of_step=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = build()
    # Outside of that mode: results of weights and states have no data, but the bounds of rows must have some.
    # The first of two steps, in which a loss that is trained beside the drafts for a part of the steps has its weight.
    batch = with_plan(made.drafter, made.loss, replace(batch, num_steps=2))
    drafter = made.drafter.train()
    weights = [*drafter.parameters(), *drafter.buffers()]
    frozen = [*made.target.model.parameters(), *made.target.model.buffers()]
    with Counted() as counted, counted_for(device_type):
        kept = _step(made, batch, mixed=mixed, own=weights)
    trained = [p for p in drafter.parameters() if p.requires_grad]
    return StepCost(
        positions=rows * width,
        executed=counted.flops,
        needed=distill_flops(
            drafter, made.target, batch.shape, reads=_needs(made) != TargetNeeds(), head=made.loss.needs_target
        ),
        kept=kept,
        peak=counted.peak,
        target_bytes=_bytes(frozen),
        trained_bytes=_bytes(weights) + ADAMW_BYTES * sum(p.numel() for p in trained),
    )


def _needs(made: Trained) -> TargetNeeds:
    return made.drafter.needs() | TargetNeeds(final=made.loss.needs_target)


def _step(made: Trained, batch: DraftBatch, *, mixed: bool, own: Sequence[Tensor]) -> int:
    """Take the step; return the bytes that the drafter's forward keeps."""
    sizes: dict[int, int] = {}

    def drafted(batch: DraftBatch) -> DraftOutput:
        with _kept(own) as kept:
            output: DraftOutput = made.drafter(batch)
        sizes.update(kept)
        return output

    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        seen = _read(made.target, batch, _needs(made))
        rows = made.target.rows_of(seen) if made.loss.needs_target else None
        batch = replace(batch, target=seen, target_rows=rows)
        loss = batch_loss(drafted, made.loss, batch, vocab_size=made.vocab_size, chunk_rows=made.chunk_rows)
    loss.total.backward()
    return sum(sizes.values())


@torch.no_grad()
def _read(target: Target, batch: DraftBatch, needs: TargetNeeds) -> TargetOutput:
    """Read like `Target.read`, without probing the model first, which needs data."""
    assert batch.plan is not None
    with (
        torch.autocast("cpu", enabled=False),
        taps(target.model, needs) as seen,
        packed(target.model, batch.plan.documents),
    ):
        final_BTD = trunk(target.model)(
            input_ids=batch.tokens_BT, position_ids=batch.positions_BT, attention_mask=None, use_cache=False
        ).last_hidden_state
    hidden_BTD = {int(index): state for index, state in seen.items() if index != "final"}
    return TargetOutput(logits_BTV=None, hidden_BTD=hidden_BTD, final_BTD=final_BTD)


@contextmanager
def _kept(own: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Yield the bytes of each storage that a forward keeps for its backward pass, without the weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in own}
    held: list[Tensor] = []
    sizes: dict[int, int] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            # Held, so that its id is not reused.
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        yield sizes
    held.clear()


class Counted(TorchDispatchMode):
    """Counts the operations of all matrix products, and the bytes of all storages from allocation to release."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                self._note(one.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, number, size)

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _forward(query: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    """Count the products of queries at the last columns; each attends to columns up to its own."""
    pairs = query[0] * (query[2] * keys[2] - query[2] * (query[2] - 1) // 2)
    return attention(query[1] * query[3], pairs, gradients=0).flops


def _backward(gradient: Any, query: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    """Count the products of the gradients, and the recomputed scores."""
    return _forward(query, keys, values) * 5 // 2


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_forward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_backward),
}
"""Torch's formulas, missing ones, and CPU attention kernels counted like CUDA's: without columns after a query."""
