"""Compares the built-in generation backend with transformers' `generate`: same prompts, batch, number type and greedy sampling.

Both write one batch in turns, whose order alternates; the interval of the ratio is over the batches. Without `--fixed` a text
ends at its end token: transformers decodes ended rows until the last text of the batch ends, the backend drops them.

    python benchmarks/smollm2_gen.py --target FOLDER --prompts gsm8k.jsonl
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from smollm2_target import loaded, parser

from drafttrain.core.console import stderr
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.target_model import Target


def main() -> None:
    """Measure and print a row of the table."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--max-new-tokens", type=int, default=64)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--fixed", action="store_true", help="No text ends before --max-new-tokens.")
    arguments = options.parse_args()
    target = loaded(arguments)
    if arguments.fixed:
        target.__dict__["eos_token_ids"] = ()
    size, new = arguments.batch_size, arguments.max_new_tokens
    prompts = [list(one.tokens) for one in read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=64)]
    arms = {"ours": ours, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, list[float]] = {name: [] for name in arms}
    same = texts = 0
    for pair in range(arguments.pairs + 1):
        batch = [prompts[(pair * size + i) % len(prompts)] for i in range(size)]
        found = {}
        for name in sorted(arms, reverse=bool(pair % 2)):
            began = time.process_time()
            found[name] = arms[name](batch, target, new if pair else 4)
            took = time.process_time() - began
            if pair:  # the first batch warms up
                seconds[name].append(took)
                tokens[name].append(sum(map(len, found[name])))
                stderr.print(f"{pair} {name}: {tokens[name][-1] / took:.1f} tokens per CPU second")
        if pair:
            same += sum(one == other for one, other in zip(*found.values(), strict=True))
            texts += size
    ratio = ratio_of_ratios((tokens["ours"], seconds["ours"]), (tokens["plain"], seconds["plain"]))
    rates = [sum(tokens[name]) / sum(seconds[name]) for name in ("plain", "ours")]
    print(f"{processor()}, {arguments.threads} threads, {arguments.dtype}, greedy, commit {commit()}\n")
    print("| batch | new tokens | generate, tokens per CPU second | drafttrain | ratio [95 % interval] | equal texts |")
    print("|---|---|---|---|---|---|")
    limit = f"{new}" if arguments.fixed else f"up to {new}"
    print(f"| {size} | {limit} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio} | {same} of {texts} |")


def ours(batch: Sequence[list[int]], target: Target, new: int) -> list[list[int]]:
    """Return the texts of the built-in backend."""
    tasks = [Task(str(i), prompt, Sampling()) for i, prompt in enumerate(batch)]
    return continuations(tasks, target, max_new_tokens=new, seed=0)


@torch.no_grad()
def plain(batch: Sequence[list[int]], target: Target, new: int) -> list[list[int]]:
    """Return the texts of transformers' `generate` on the prompts padded at the left."""
    width = max(map(len, batch))
    tokens_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
    ends: Any = list(target.eos_token_ids) or None
    target.model.generation_config.eos_token_id = ends
    out_BT = target.model.generate(
        tokens_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return [until_end(row[width:], set(ends or ())) for row in out_BT.tolist()]


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return a text up to and with its end token."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in ends), tokens)


if __name__ == "__main__":
    main()
