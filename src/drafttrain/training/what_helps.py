"""Settings to change where a training needs more memory than there is, and how much that saves."""

from __future__ import annotations

from collections.abc import Iterator

from drafttrain.training.settings import TrainSettings

MANY_BYTES = 10**9
"""Logits from here on are worth a change."""


def what_helps(
    settings: TrainSettings,
    *,
    processes: int,
    trained: int,
    recomputes: bool,
    blocks_bytes: int | None,
    device_type: str,
    logits_bytes: int = 0,
) -> list[str]:
    """Return the changes that reduce the memory of a step, one a line, the cheapest first.

    Args:
        trained: Number of trained parameters.
        recomputes: What is trained can compute its activations again.
        blocks_bytes: Bytes of the blocks of a target that is run in a step; 0: none is run; None: the training never runs one.
        logits_bytes: What the loss holds at once, if it is known.
    """
    changes = []
    now = settings.largest_micro_batch(processes)
    if now > 1:
        then = now // 2
        changes.append(
            f"train.records_per_device={then} (now {now}): {then} of a step's records at once in place of {now}, "
            f"{then / now:.0%} of the activations and logits; the result is the same"
        )
    if logits_bytes >= MANY_BYTES:
        rows = "by size" if settings.loss_chunk_rows is None else settings.loss_chunk_rows
        changes.append(
            f"train.loss_chunk_rows, fewer (now {rows}): the loss holds up to {logits_bytes / 1e9:.2f} GB at once"
        )
    if recomputes and not settings.activation_checkpointing:
        changes.append(
            "train.activation_checkpointing=true: the drafter's activations are computed again, not stored; slower steps"
        )
    if blocks_bytes is not None:
        changes.append("data.cache, if it is none: the target is not run in a step, so it needs no activations")
        changes += _for_target(settings, processes, blocks_bytes)
    changes += _for_states(settings, processes, trained, device_type)
    return [*changes, "data.max_length: activations shrink with it; this changes the training data"]


def _for_target(settings: TrainSettings, processes: int, blocks_bytes: int) -> Iterator[str]:
    """Yield the changes that free the memory of the target's blocks."""
    if not blocks_bytes or settings.target_placement != "replicated":
        return
    size = blocks_bytes / 1e9
    yield f"train.target_placement=absent, with a data.cache: {size:.2f} GB of the target's blocks are not loaded"
    if processes > 1:
        yield f"train.target_placement=sharded: of these {size:.2f} GB each process holds {size / processes:.2f} GB; slower steps"


def _for_states(settings: TrainSettings, processes: int, trained: int, device_type: str) -> Iterator[str]:
    """Yield the changes that move or partition gradients and the optimizer's two moments in float32."""
    if settings.optimizer != "adamw":
        return
    states = 8 * trained / 1e9
    if processes > 1 and settings.zero_stage < 2:
        yield (
            f"train.deepspeed={{stage: 2}} (now {settings.zero_stage}): optimizer states and gradients, {1.5 * states:.2f} GB, "
            f"are spread over {processes} processes"
        )
    if device_type == "cuda" and not (settings.deepspeed and settings.deepspeed.offloads):
        stage = max(2, settings.zero_stage)
        yield f"train.deepspeed={{stage: {stage}, offload_optimizer: cpu}}: {states:.2f} GB of optimizer states leave the device"
