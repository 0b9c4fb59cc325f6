"""Tiny EAGLE drafters with weights large enough that every part matters, and a plain rollout of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama


def eagle_target(*, vocab_size: int = 257, num_layers: int = 4, hidden_size: int = 32, seed: int = 0) -> Target:
    """Return a random float64 target that is deep enough for three taps."""
    model = random_llama(num_layers=num_layers, vocab_size=vocab_size, hidden_size=hidden_size, seed=seed).double()
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def eagle_drafter(kind: str, target: Target, *, seed: int = 1, scale: float = 0.2, **settings: Any) -> Any:
    """Return a float64 drafter of this kind; matrices are drawn again with a standard deviation of `scale`."""
    torch.manual_seed(seed)
    entry: Any = drafters.entry(kind)
    drafter = entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer).double()
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if name != "lm_head.weight":
                parameter.copy_(
                    scale * torch.randn_like(parameter)
                    if parameter.ndim == 2
                    else 1 + 0.2 * torch.randn_like(parameter)
                )
    return drafter.eval()


def packed(
    target: Target, drafter: Any, lengths: tuple[int, ...], *, width: int, seed: int = 2
) -> tuple[DraftBatch, list[Any]]:
    """Return random packed documents, read by the target, and where each one starts."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(1, target.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    batch, places = pack([Record("", text, [True] * len(text)) for text in texts], width=width, weight_of_step=1.0)
    return replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs())), places


def chain_logits(drafter: Any, target: Target, tokens: list[int], slot: int, num_steps: int) -> list[Tensor]:
    """Return the logits of a chain of draft tokens after `slot`, token by token, with a plain list as the cache."""
    text = torch.tensor([tokens])
    seen = target.read(text, torch.arange(len(tokens))[None], drafter.needs())
    hidden_TD = drafter.fused(drafter.features(seen))[0]
    cache: list[tuple[Tensor, Tensor]] = []

    def read(token: int, hidden_D: Tensor, position: int) -> Tensor:
        embedded = drafter.embed(torch.tensor([[token]]))
        inputs, residual = drafter.entering(embedded, hidden_D.view(1, 1, -1))
        query, key, value = drafter.layer.project(inputs, torch.tensor([[position]]))
        cache.append((key[0, :, 0], value[0, :, 0]))
        groups = query.shape[1] // key.shape[1]
        mixed = []
        for head in range(query.shape[1]):
            scores = torch.stack([query[0, head, 0] @ k[head // groups] for k, _ in cache]) / math.sqrt(query.shape[-1])
            mixed.append(scores.softmax(0) @ torch.stack([v[head // groups] for _, v in cache]))
        return drafter.layer.finish(torch.stack(mixed)[None, :, None], residual)[0, 0]

    for t in range(slot + 1):
        state = read(tokens[t + 1], hidden_TD[t], t)
    found = [drafter.head(state[None], 1)[0]]
    for step in range(1, num_steps):
        state = read(tokens[slot + 1 + step], drafter.fed_back(state), slot + step)
        found.append(drafter.head(state[None], step + 1)[0])
    return found
