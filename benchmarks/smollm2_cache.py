"""Compares caching of the target's states with bare forward passes of the same tokens: no head, no padding, nothing stored.

The cache holds the final state and three hidden ones, as for EAGLE-3. The bare forward passes read the same texts, joined and cut into
rows of equal length. Both read one part of the texts in turns, whose order alternates; the interval is over the parts.

    python benchmarks/smollm2_cache.py --target FOLDER --prompts gsm8k.jsonl
"""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from smollm2_target import loaded, parser, timed

from drafttrain.core.console import stderr
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.stored.validation_target import cached_target
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.target_model import Target


def main() -> None:
    """Measure and print the table."""
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=128, help="Texts of a part; of few texts more is padding.")
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--shape", type=int, nargs=2, default=(8, 128), help="Rows and tokens of a bare forward pass.")
    arguments = options.parse_args()
    target = loaded(arguments)
    found = read_prompts(
        arguments.prompts, target.tokenizer, prompt_tokens=64, limit=4 + arguments.pairs * arguments.texts
    )
    texts = [list(prompt.tokens) for prompt in found]
    parts = [texts[start : start + arguments.texts] for start in range(4, len(texts), arguments.texts)]
    stored(target, texts[:4])
    forwards(target, texts[:4], (1, 64))
    seconds: dict[str, list[float]] = {"stored": [], "bare": []}
    for number, part in enumerate(parts):
        turns = {
            "stored": lambda part=part: stored(target, part),
            "bare": lambda part=part: forwards(target, part, arguments.shape),
        }
        for name in sorted(turns, reverse=bool(number % 2)):
            seconds[name].append(timed(turns[name]))
        stderr.print(f"part {number}: {seconds['stored'][-1] / seconds['bare'][-1]:.3f}")
    tokens = [float(sum(map(len, part))) for part in parts]
    ratio = ratio_of_ratios((tokens, seconds["stored"]), (tokens, seconds["bare"]))
    bare, ours = (sum(tokens) / sum(seconds[name]) for name in ("bare", "stored"))
    print(f"{processor()}, {arguments.threads} threads, {arguments.dtype}, commit {commit()}\n")
    print(
        "| texts | mean length | bare, tokens per CPU second | cached | ratio [95 % interval] |\n|---|---|---|---|---|"
    )
    print(f"| {len(texts) - 4} | {sum(tokens) / (len(texts) - 4):.0f} | {bare:,.0f} | {ours:,.0f} | {ratio} |")


def stored(target: Target, texts: Sequence[list[int]]) -> None:
    """Cache the states of the texts in a new folder."""
    layers = int(target.model.config.num_hidden_layers)
    needs = TargetNeeds(hidden=(2, layers // 2, layers - 3), final=True)
    with tempfile.TemporaryDirectory() as folder:
        cached_target(Path(folder), texts, target, needs=needs, dtype="bfloat16", max_gb=10)


@torch.no_grad()
def forwards(target: Target, texts: Sequence[list[int]], shape: tuple[int, int]) -> None:
    """Read the texts, joined and cut into rows of equal length, without the head."""
    rows, width = shape
    joined = torch.tensor(list(itertools.chain.from_iterable(texts)))
    whole = joined[: len(joined) // width * width].view(-1, width)
    for tokens_BT in [*whole.split(rows), joined[whole.numel() :][None]]:
        if tokens_BT.numel():
            target.model.model(input_ids=tokens_BT, use_cache=False)


if __name__ == "__main__":
    main()
