"""Measures what a cache with fewer bits costs: bytes, the error of states, and the acceptance that it can take from a drafter.

`costs` is the mean over tokens of 1 - sum min(p, p'), where p is the target's distribution and p' the one from the stored state: of the
final state through the head, of a hidden state through the blocks behind it. On average no drafter's acceptance changes by more.

    python benchmarks/cache_types.py --target FOLDER --prompts gsm8k.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from smollm2_target import loaded, parser, timed
from torch import Tensor

from drafttrain.core.eight_bit import GROUP, from_eight_bits, in_eight_bits, stored_width
from drafttrain.core.probability import acceptance_rate
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.stored.head_rounding import rounded_for_head
from drafttrain.eval.prompts import read_prompts
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.logits import head_logits

WHOLE = 1 << 20
Change = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print the table."""
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=8)
    options.add_argument("--prompt-tokens", type=int, default=64, help="Tokens of a plain text.")
    options.add_argument("--every", type=int, default=1, help="Measure the states that enter every such block.")
    arguments = options.parse_args()
    target = loaded(arguments)
    prompts = read_prompts(
        arguments.prompts, target.tokenizer, prompt_tokens=arguments.prompt_tokens, limit=arguments.texts
    )
    texts = [torch.tensor(prompt.tokens)[None] for prompt in prompts]
    width = int(target.model.get_output_embeddings().weight.shape[1])
    print(f"{processor()}, {arguments.threads} threads, {arguments.dtype}, commit {commit()}")
    print(f"{target.name}: {width} features, {len(texts)} texts, {sum(map(torch.numel, texts))} tokens\n")
    print("| stored as | bytes of bfloat16 | state | relative error | costs, mean | costs, worst token |")
    print("|---|---|---|---|---|---|")
    exact = [final(target, tokens_BT) for tokens_BT in texts]
    for name, (change, size, states) in types(target, width, arguments.every).items():
        for state in states:
            error, costs_N = measured(target, texts, exact, state, change)
            row = f"{float(error):.4f} | {float(costs_N.mean()):.4f} | {float(costs_N.max()):.4f}"
            print(f"| {name} | {size / (2 * width):.3f} | {state} | {row} |", flush=True)
    tokens = sum(map(torch.numel, texts))
    reading = timed(lambda: [final(target, tokens_BT) for tokens_BT in texts])
    rounding = timed(lambda: [rounded(target, exact_ND) for exact_ND in exact])
    print(f"\nCPU ms a token: {1000 * reading / tokens:.1f} the target, {1000 * rounding / tokens:.1f} the rounding")


def types(target: Target, width: int, every: int) -> dict[str, tuple[Change, int, list[int | str]]]:
    """Return, by name, what storing does to a state, the bytes of a row, and the states that are stored so."""
    hidden: list[int | str] = list(range(0, len(blocks(target.model)), every))
    made: dict[str, tuple[Change, int, list[int | str]]] = {
        "bfloat16": (lambda states: states.bfloat16().float(), 2 * width, [*hidden, "final"])
    }
    for group in (WHOLE, 128, 64, 32):
        name = "int8, a scale a token" if group == WHOLE else f"int8, a scale for {group} features"
        size = stored_width(width, group=group)
        made[name] = (partial(stored_and_read, group=group), size, [*hidden, "final"])
    name = f"int8, a scale for {GROUP} features, rounded for the head"
    made[name] = (partial(rounded, target), stored_width(width), ["final"])
    return made


def stored_and_read(states: Tensor, *, group: int) -> Tensor:
    """Return the states after eight bits."""
    return from_eight_bits(in_eight_bits(states, group=group), group=group)


def rounded(target: Target, final_ND: Tensor) -> Tensor:
    """Return final states after the eight bits of a cache."""
    return from_eight_bits(rounded_for_head(final_ND, target.model, num_tokens=target.num_tokens))


@torch.no_grad()
def measured(
    target: Target, texts: list[Tensor], exact: list[Tensor], state: int | str, change: Change
) -> tuple[Tensor, Tensor]:
    """Return the mean relative error of a changed state and, by token, what it costs."""
    errors, costs = [], []
    for tokens_BT, exact_ND in zip(texts, exact, strict=True):
        if state == "final":
            given_ND, changed_ND = exact_ND, change(exact_ND)
            after_ND = changed_ND
        else:
            with entering(target, int(state), change) as seen:
                after_ND = final(target, tokens_BT)
            given_ND, changed_ND = (one[0] for one in seen)
        errors.append((changed_ND - given_ND).norm(dim=-1) / given_ND.norm(dim=-1).clamp_min(1e-30))
        p_NV, changed_NV = (
            head_logits(target.model, one.to(target.model.dtype)).double().softmax(dim=-1)
            for one in (exact_ND, after_ND)
        )
        costs.append((1 - acceptance_rate(p_NV, changed_NV)).clamp_min(0))
    return torch.cat(errors).mean(), torch.cat(costs)


def final(target: Target, tokens_BT: Tensor) -> Tensor:
    """Return final_ND of one text."""
    positions_BT = torch.arange(tokens_BT.shape[1])[None]
    final_BTD = target.read(tokens_BT, positions_BT, TargetNeeds(final=True)).final_BTD
    assert final_BTD is not None
    return final_BTD[0].float()


@contextmanager
def entering(target: Target, index: int, change: Change) -> Iterator[list[Tensor]]:
    """Within this context a block reads a changed state; yield the given one and the changed one."""
    seen: list[Tensor] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs["hidden_states"]
        changed = change(given.float())
        seen[:] = [given.float(), changed]
        changed = changed.to(given.dtype)
        return ((changed, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": changed})

    handle = blocks(target.model)[index].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
