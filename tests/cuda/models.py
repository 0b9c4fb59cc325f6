"""The models that tests of parts share: a target on the first GPU, and a drafter of every kind at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter, drafters
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.engine import Engine
from drafttrain.eval.length import length_policies
from drafttrain.heads import heads
from drafttrain.target_model import Target
from tests.cuda.kinds import TUNED, drafter_settings

PROMPTS = [Prompt(f"p{number}", list(range(1 + number, 10 + 4 * number))) for number in range(2)]
MAX_NEW_TOKENS = 8


def new_drafter(name: str, target: Target, *, device: str = "cuda:0") -> Drafter:
    """Return a kind's drafter in float32, as a run makes it."""
    torch.manual_seed(0)
    settings = drafter_settings(name)
    component: Any = drafters.entry(settings.kind).component
    drafter: Drafter = component.create(settings, target=target, tokenizer=target.tokenizer)
    drafter.to(device)
    drafter.fit_vocabulary(lambda: np.arange(target.num_tokens)[::-1].copy())
    return drafter


def texts(lengths: tuple[int, ...]) -> list[Record]:
    """Return records of these lengths whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(1, 257, (length,), generator=generator).tolist()
        found.append(Record(f"r{number}", tokens, [False] * 4 + [True] * (length - 4)))
    return found


def packed(*, step: int = 0, weight: float = 60.0) -> DraftBatch:
    """Return a micro-batch on the CPU: three texts in two rows, one of them with padding."""
    batch, _ = pack(texts((20, 17, 11)), width=32, weight_of_step=weight, step=step)
    return batch


def engine(target: Target, proposer: Any, *, length: Any, rule: Any, **options: Any) -> Engine:
    """Return the loop with a length policy and a rule of these settings."""
    options = {"max_new_tokens": MAX_NEW_TOKENS, "stop_tokens": ()} | options
    policy = length_policies.build(length)
    return Engine(target, proposer, rule=acceptance_rules.build(rule), policy=policy, **options)


def head_folder(kind: str, folder: Path, *, hidden_size: int) -> str:
    """Write an untrained head and return its folder."""
    folder = folder / kind
    folder.mkdir()
    entry = heads.entry(kind)
    settings = entry.settings(drafter="none")
    entry.component(settings, hidden_size).save(folder)
    return str(folder)


def decoding_drafter(name: str, target: Target) -> Drafter:
    """Return a kind's drafter as it decodes: in the target's type, and away from where it starts."""
    drafter: Any = new_drafter(name, target).eval()
    if name == "kangaroo":
        # At its start the adapter passes the target's states on as they are: every draft is then accepted.
        torch.nn.init.normal_(drafter.adapter.layers[0].self_attn.o_proj.weight)
    if name.startswith("medusa"):
        drafter.paths = [(0,), (1,), (0, 0)]
    made: Drafter = drafter if name in TUNED else drafter.to(torch.bfloat16)
    return made
