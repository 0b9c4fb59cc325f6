"""A drafter that has memorized the target's outputs for some prompts: it is often right, but not always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from drafttrain.core.texts import Prompt, Record, Sampling
from drafttrain.data_gen.packing import pack
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropy
from drafttrain.losses.chunked import row_losses
from drafttrain.target_model import Target


def learn(drafter: Any, target: Target, prompts: Sequence[Prompt], *, steps: int, new_tokens: int, lr: float) -> Any:
    """Return the drafter after so many steps on the target's greedy outputs."""
    engine = Engine(
        target,
        NoDraft(),
        rule=Lossless(),
        policy=FixedLength(),
        sampling=Sampling(),
        max_new_tokens=new_tokens,
        stop_tokens=(),
    )
    texts = engine.generate(list(prompts))
    records = [
        Record(one.id, [*one.prompt_tokens, *one.tokens], [False] * len(one.prompt_tokens) + [True] * new_tokens)
        for one in texts
    ]
    batch, _ = pack(records, width=max(len(record.tokens) for record in records), weight_of_step=1.0)
    needs = drafter.needs()
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, needs))
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    drafter.train()
    for step in range(steps):
        drafted = drafter(replace(batch, step=step))
        loss_N, _ = row_losses(
            CrossEntropy(), drafted, align(drafted, batch), batch, vocab_size=target.num_tokens, measured=False
        )
        optimizer.zero_grad()
        loss_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return drafter.eval()
