"""Operations and memory of one micro-batch at its real sizes, counted on tensors without data.

It runs the project's own target, drafter and loss, forward and backward, under PyTorch's fake tensors, so that an 8 B model needs
neither memory nor a GPU. Times are not measured: operations are.

B = sequences, T = positions
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.flops import attention
from drafttrain.core.piece_size import counted_for
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.core.weights import weight_bytes
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.stored.wanted import Wanted, with_arrays
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import are_alike, blocks, only_first_block, taps, trunk
from drafttrain.target_model.packed_forward import NotPlain, packed
from drafttrain.training.flops import distill_flops
from drafttrain.training.optimizer import state_bytes
from drafttrain.training.settings import TrainSettings

ALTERED_SLOTS = 16
"""Of each text, trained by a drafter that reads it a second time."""


@dataclass(frozen=True)
class Trained:
    """The parts of a training step, made of tensors without data."""

    drafter: Drafter
    loss: Loss
    target: Target
    vocab_size: int
    settings: TrainSettings = field(default_factory=TrainSettings)
    stored: Wanted | None = None
    """Outputs of the target that batches bring, so that it is not run."""
    elsewhere: bool = False
    """The target's blocks run in an engine, whose operations are not counted."""

    def stored_arrays(self, *shape: int) -> dict[str, Tensor]:
        """Return what batches bring for tokens in this shape."""
        if self.stored is None:
            return {}
        summed = self.drafter.vocabulary is not None and self.stored.distribution == "states"
        return self.stored.empty(shape, self.target, summed=summed)

    def sizes(self) -> dict[str, int]:
        """Return what the sizes alone decide of a `StepCost`: parameters, and bytes of weights and of the optimizer's state."""
        drafter, model = self.drafter, self.target.model
        trained = [p for p in drafter.parameters() if p.requires_grad]
        frozen = [*model.parameters(), *(p for p in drafter.parameters() if not p.requires_grad)]
        return {
            "trained": sum(p.numel() for p in trained),
            "frozen": sum({id(p): p.numel() for p in frozen}.values()),
            "target_bytes": _bytes([*model.parameters(), *model.buffers()]),
            "blocks_bytes": weight_bytes(blocks(model)),
            "drafter_bytes": _bytes([*drafter.parameters(), *drafter.buffers()]),
            "optimizer_bytes": state_bytes(drafter, self.settings),
        }

    def bytes_stored(self) -> int:
        """Return the bytes that are stored for a token."""
        return sum(array.nbytes for array in self.stored_arrays().values())


@dataclass(frozen=True)
class StepCost:
    """Operations and memory of one micro-batch, and the memory of weights and optimizer, in bytes."""

    positions: int
    executed: int
    """Floating-point operations of the matrix products that are run."""
    needed: int
    """Operations that the arithmetic needs (`training.flops`)."""
    trained: int
    """Parameters that are trained."""
    frozen: int
    """Parameters of the target, and those of the drafter that are not trained."""
    target_bytes: int
    blocks_bytes: int
    """Of these, those of the target's blocks."""
    drafter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept: int
    """What the drafter's forward stores for its backward pass, autocast's copies of weights included."""
    logits: int
    """Tensors of the loss that have a number for each token of a vocabulary, at most."""
    peak: int
    """Peak beyond weights and the optimizer's state: activations, gradients, logits."""

    @property
    def trained_bytes(self) -> int:
        """Weights of the drafter and the optimizer's state."""
        return self.drafter_bytes + self.optimizer_bytes

    @property
    def memory(self) -> int:
        """Peak bytes. A GPU's context and the allocator's fragmentation, 1 to 2 GB, come on top."""
        return self.target_bytes + self.trained_bytes + self.peak


def step_cost(
    build: Callable[[], Trained],
    *,
    rows: int,
    width: int,
    prompt: int = 0,
    accumulates: bool = False,
    device_type: str = "cuda",
) -> StepCost:
    """Count one micro-batch of full rows, one document each.

    Args:
        build: Called in a mode in which new tensors have no data.
        prompt: First tokens of each document that are not trained.
        accumulates: The gradients of earlier micro-batches of the step are there.
        device_type: The device whose cost is counted; it decides how much exists at once, and `precision: auto`.
    """
    records = [Record(str(row), [1] * width, [False] * prompt + [True] * (width - prompt)) for row in range(rows)]
    batch, _ = pack(records, width=width, weight_of_step=1.0)
    # For a drafter that is trained on a block of each text, altered.
    slots_N = (torch.arange(rows)[:, None] * width + torch.arange(width)[-ALTERED_SLOTS:]).flatten()
    batch = replace(batch, altered=AlteredText(batch.tokens_BT, slots_N, torch.ones(len(slots_N))))
    with FakeTensorMode(allow_non_fake_inputs=True) as without_data:
        made = build()
    # Outside of that mode: results of weights and states have no data, but the bounds of rows must have some.
    # The first of two steps, in which a loss that is trained beside the drafts for a part of the steps has its weight.
    batch = with_plan(made.drafter, made.loss, replace(batch, num_steps=2))
    drafter = made.drafter.train()
    if made.settings.activation_checkpointing:
        drafter.recompute_activations()
    trained = [p for p in drafter.parameters() if p.requires_grad]
    outputs = made.target.model.get_output_embeddings()
    widths = {made.vocab_size, int(outputs.weight.shape[0])}
    if drafter.vocabulary is not None:
        widths.add(len(drafter.vocabulary))
    with Counted(widths) as counted, counted_for(device_type):
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        kept = _step(made, batch, counted, without_data, mixed=_mixed(made.settings, device_type))
    return StepCost(
        positions=rows * width,
        executed=counted.flops,
        needed=distill_flops(drafter, made.target, batch.shape, reads=_reads(made), head=_runs_head(made)),
        gradient_bytes=_bytes([p.grad for p in trained if p.grad is not None]),
        kept=kept,
        logits=counted.most_wide,
        peak=counted.peak,
        **made.sizes(),
    )


def _mixed(settings: TrainSettings, device_type: str) -> bool:
    return settings.on(device_type).precision == "bf16-mixed"


def _needs(made: Trained) -> TargetNeeds:
    return made.drafter.needs() | TargetNeeds(final=made.loss.needs_target)


def _reads(made: Trained) -> bool:
    return made.stored is None and not made.elsewhere and _needs(made) != TargetNeeds()


def _runs_head(made: Trained) -> bool:
    """Return whether the target's head computes its distribution, from states of this step or stored ones."""
    return made.loss.needs_target and (made.stored is None or made.stored.distribution == "states")


def _step(made: Trained, batch: DraftBatch, counted: Counted, without_data: FakeTensorMode, *, mixed: bool) -> int:
    """Take the step; return the bytes that the drafter's forward keeps."""
    own = [*made.drafter.parameters(), *made.drafter.buffers()]
    sizes: dict[int, int] = {}

    def drafted(batch: DraftBatch) -> DraftOutput:
        with _kept(own) as kept:
            output: DraftOutput = made.drafter(batch)
        sizes.update(kept)
        # From here on a tensor as wide as a vocabulary holds logits, or what the loss makes of them.
        counted.in_loss = True
        return output

    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        if made.stored is None:
            before = counted.flops
            seen = _read(made.target, batch, _needs(made), counted)
            if made.elsewhere:
                counted.flops = before
            rows = made.target.rows_of(seen) if made.loss.needs_target else None
            batch = replace(batch, target=seen, target_rows=rows)
        else:
            with without_data:
                arrays = made.stored_arrays(*batch.tokens_BT.shape)
            batch = with_arrays(batch, arrays, made.stored, made.target.model, num_tokens=made.vocab_size).restored()
        loss = batch_loss(
            drafted, made.loss, batch, vocab_size=made.vocab_size, chunk_rows=made.settings.loss_chunk_rows
        )
    counted.in_loss = False
    loss.total.backward()
    return sum(sizes.values())


@torch.no_grad()
def _read(target: Target, batch: DraftBatch, needs: TargetNeeds, counted: Counted) -> TargetOutput:
    """Read like `Target.read`, without probing the model first, which needs data.

    Of blocks that are alike the first alone is run, and its operations are counted as often as there are blocks.
    """
    if needs == TargetNeeds():
        return TargetOutput()
    model, before = target.model, counted.flops
    if not are_alike(blocks(model)):
        return _outputs(model, batch, needs)
    width = model.get_input_embeddings().embedding_dim
    weight = next(model.parameters())
    # They are there while the last block runs.
    hidden_BTD = {index: weight.new_empty(*batch.tokens_BT.shape, width) for index in needs.hidden}
    with only_first_block(model) as times:
        seen = _outputs(model, batch, TargetNeeds(final=True))
    counted.flops += (times - 1) * (counted.flops - before)
    return replace(seen, hidden_BTD=hidden_BTD)


def _outputs(model: Any, batch: DraftBatch, needs: TargetNeeds) -> TargetOutput:
    assert batch.plan is not None

    def read() -> TargetOutput:
        with torch.autocast("cpu", enabled=False), taps(model, needs) as seen:
            final_BTD = trunk(model)(
                input_ids=batch.tokens_BT, position_ids=batch.positions_BT, attention_mask=None, use_cache=False
            ).last_hidden_state
        hidden_BTD = {int(index): state for index, state in seen.items() if index != "final"}
        return TargetOutput(logits_BTV=None, hidden_BTD=hidden_BTD, final_BTD=final_BTD)

    try:
        with packed(model, batch.plan.documents):
            return read()
    except NotPlain:
        # An attention of its own: counted as the model's own code runs it, with one document a row.
        return read()


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

    def __init__(self, widths: Collection[int] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.now = 0
        self.peak = 0
        self.in_loss = False
        self.most_wide = 0
        """Bytes of the tensors of the loss that are as wide as one of `widths`, at most."""
        self._wide = 0
        self._widths = widths
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
                self._note(one.untyped_storage(), wide=self.in_loss and one.ndim > 1 and one.shape[-1] in self._widths)
        return result

    def _note(self, storage: Any, *, wide: bool) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        self._wide += size if wide else 0
        self.most_wide = max(self.most_wide, self._wide)
        weakref.finalize(storage, self._gone, number, size, wide=wide)

    def _gone(self, number: int, size: int, *, wide: bool) -> None:
        self._known.discard(number)
        self.now -= size
        self._wide -= size if wide else 0


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
