"""A target whose blocks are partitioned over the processes by ZeRO-3: a block is gathered only while it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import TensorFiles
from drafttrain.target_model.absent_target import bare_model, target_folder
from drafttrain.target_model.anatomy import blocks, trunk
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.documents import probe
from drafttrain.target_model.folders import fingerprint_of
from drafttrain.target_model.meta_model import load_tensors, stored_tensors
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target
from drafttrain.target_model.tokenizer import load_target_tokenizer
from drafttrain.target_model.weights_digest import add_to_digest
from drafttrain.training.strategy import join_deepspeed, whole

CONFIG = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


class ShardedTarget(Target):
    """Embedding, final norm and head are whole on every process, because drafters use them; each block is partitioned.

    A forward gathers one block after the other, so all processes must run it equally often. If the processes have different work,
    `for_own_share` lets those that have finished run it along until the last one has finished.
    """

    sharded: ClassVar[bool] = True

    def __init__(self, model: Any, tokenizer: Any, *, name: str, fingerprint: str) -> None:
        super().__init__(model, tokenizer, name=name, fingerprint=fingerprint)
        self._in_rounds = False
        for block in blocks(model):
            _gather_around(block)
        trunk(model).register_forward_pre_hook(lambda *_: self._begin_forward())
        # Here, where all processes are.
        probe(model)

    @classmethod
    def load(cls, settings: TargetSettings) -> ShardedTarget:
        """Read a target block by block and keep this process's partition; no process holds more than one whole block.

        Raises:
            CheckpointError: Its files use other weight names than the model.
        """
        import deepspeed

        join_deepspeed()
        folder, device = target_folder(settings), pick_device(settings.device)
        model, files = bare_model(settings), TensorFiles(folder)
        _refuse_mixed_types(model, settings)
        stack = blocks(model)
        of_blocks = {id(tensor) for tensor in stored_tensors(stack)}
        load_tensors(
            model, [tensor for tensor in stored_tensors(model) if id(tensor) not in of_blocks], files, device=device
        )
        for block in stack:
            load_tensors(model, stored_tensors(block), files, device=device)
            deepspeed.zero.Init(module=block, config_dict_or_path=CONFIG)
        tokenizer = load_target_tokenizer(settings)
        return cls(model, tokenizer, name=str(settings.model), fingerprint=fingerprint_of(folder))

    def _begin_forward(self) -> None:
        if self._in_rounds:
            _any(True, self.device)

    @contextmanager
    def for_own_share(self) -> Iterator[Target]:
        """Yield the target; on exit, keep running it with the other processes until none needs it."""
        self._in_rounds = True
        try:
            yield self
            while _any(False, self.device):
                self._take_part()
        finally:
            self._in_rounds = False

    @torch.no_grad()
    def _take_part(self) -> None:
        self._in_rounds = False
        trunk(self.model)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        self._in_rounds = True

    def weights_digest(self) -> str:
        """Return the digest of the whole weights, the same as for an unsharded target; all processes must call it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            with whole([tensor]):
                add_to_digest(digest, name, tensor)
        return digest.hexdigest()


def _gather_around(block: nn.Module) -> None:
    """Gather a block's weights just before its forward, and release them just after."""
    gathered = []

    def before(*_: Any) -> None:
        context = whole(block.parameters())
        context.__enter__()
        gathered.append(context)

    def after(*_: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(before, prepend=True)
    block.register_forward_hook(after, always_call=True)


def _any(flag: bool, device: torch.device) -> bool:
    """Return whether any process passes True: one small collective."""
    count = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(count)
    return bool(count)


def _refuse_mixed_types(model: Any, settings: TargetSettings) -> None:
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    if kept and model.dtype in (torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{settings.model}: {', '.join(sorted(kept))} stay in float32 in {type(model).__name__}, which a sharded target does "
            "not support: use train.target_placement: replicated"
        )
