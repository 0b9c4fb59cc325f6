"""Compares a round of the evaluator with the bare forward passes that it contains, for a target and drafts that cost nothing.

The drafts are a chain of 4 tokens or a tree of 12. Two of them are the text's next tokens, so that every round accepts two. The bare
forward passes read as many tokens after as long a text, with a plain transformers cache that is cropped, and masks made
beforehand. On each prompt the order is loop, bare, bare, loop; times are CPU seconds and contain the reading of the prompt; the
interval is over the prompts.

    python benchmarks/smollm2_round.py --target FOLDER --prompts gsm8k.jsonl
"""

from collections.abc import Sequence
from typing import Any

import torch
from smollm2_target import loaded, parser, timed
from torch import Tensor
from transformers import DynamicCache

from drafttrain.core.console import stderr
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import Context, Proposal, fixed_chain, fixed_tree
from drafttrain.core.provenance import commit, processor
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.target_model import Target

TREE = (0, 0, 0, 2, 2, 1, 3, 5, 5, 4, 7, 8)
"""Parents of the nodes 1 to 12."""
PATH = (2, 4)
"""The nodes with the text's next tokens: no prefix of the tree."""
FILLER = 7


def main() -> None:
    """Measure and print the table."""
    options = parser(__doc__)
    options.add_argument("--num-prompts", type=int, default=8)
    options.add_argument("--max-new-tokens", type=int, default=64)
    arguments = options.parse_args()
    target = loaded(arguments)
    prompts = read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=64, limit=arguments.num_prompts + 1)
    print(f"{processor()}, {arguments.threads} threads, {arguments.dtype}, commit {commit()}\n")
    print(
        "| drafts | temperature | rounds | bare, ms a round | loop | loop / bare [95 % interval] |\n|---|---|---|---|---|---|"
    )
    for shape in ("chain of 4", "tree of 12"):
        for temperature in (0.0, 1.0):
            print(row(target, prompts, shape, Sampling(temperature), new=arguments.max_new_tokens), flush=True)


def row(target: Target, prompts: Sequence[Prompt], shape: str, sampling: Sampling, *, new: int) -> str:
    """Measure a shape of drafts at a temperature; return its row of the table."""
    ledger, drafts = Ledger(), Known(shape)
    plain = engine(target, NoDraft(), sampling, new)
    drafting = engine(target, drafts, sampling, new, listener=ledger.append)
    seconds: dict[str, list[float]] = {"loop": [], "bare": []}
    rounds: list[float] = []
    for number, prompt in enumerate(prompts):
        drafts.text = [*prompt.tokens, *plain.generate([prompt])[0].tokens]
        ledger.events.clear()
        loop = timed(lambda p=prompt: drafting.generate([p]))
        events = list(ledger.events)
        calls = [(event, mask(event, shape, target.model.dtype)) for event in events]
        bare = sum(timed(lambda c=calls: forwards(target.model, c)) for _ in range(2))
        loop += timed(lambda p=prompt: drafting.generate([p]))
        if number:  # the first prompt warms up
            seconds["loop"].append(loop / 2)
            seconds["bare"].append(bare / 2)
            rounds.append(float(sum(not event.prefill for event in events)))
            stderr.print(f"{shape}, temperature {sampling.temperature:g}, prompt {number}: {loop / bare:.3f}")
    ratio = ratio_of_ratios((seconds["loop"], rounds), (seconds["bare"], rounds))
    bare_ms, loop_ms = (1000 * sum(seconds[name]) / sum(rounds) for name in ("bare", "loop"))
    return f"| {shape} | {sampling.temperature:g} | {sum(rounds):.0f} | {bare_ms:.1f} | {loop_ms:.1f} | {ratio} |"


def engine(
    target: Target, proposer: Any, sampling: Sampling, new: int, *, listener: ForwardListener | None = None
) -> Engine:
    """Return the evaluator's loop; no text ends before `new` tokens."""
    return Engine(
        target,
        proposer,
        rule=Lossless(),
        policy=FixedLength(),
        sampling=sampling,
        max_new_tokens=new,
        stop_tokens=(),
        listener=listener,
    )


class Known:
    """Drafts the next two tokens of a text that is known, among others."""

    needs = TargetNeeds()

    def __init__(self, shape: str) -> None:
        self._chain = shape.startswith("chain")
        self.text: list[int] = []

    def begin(self, contexts: Sequence[Context], seen: Sequence[Any]) -> None:
        (self._context,) = contexts

    def propose(self, *arguments: Any) -> list[Proposal]:
        length, root = len(self._context.tokens), self._context.tokens[-1]
        first, second = [*self.text[length : length + 2], FILLER, FILLER][:2]
        if self._chain:
            return [fixed_chain(root, [first, second, FILLER, FILLER])]
        tokens = {PATH[0]: first, PATH[1]: second}
        return [fixed_tree(root, [(tokens.get(node, FILLER), parent) for node, parent in enumerate(TREE, start=1)])]

    def observe(self, *arguments: Any) -> None:
        pass

    def drop(self, keep: Sequence[int]) -> None:
        pass


def mask(event: ForwardEvent, shape: str, dtype: torch.dtype) -> Tensor | None:
    """Return a mask of the size that a tree needs; None for a chain."""
    if event.prefill or shape.startswith("chain"):
        return None
    return torch.zeros(1, 1, event.shape.num_tokens, event.shape.context + event.shape.num_tokens, dtype=dtype)


@torch.no_grad()
def forwards(model: Any, calls: Sequence[tuple[ForwardEvent, Tensor | None]]) -> None:
    """Run the forward passes alone."""
    cache = DynamicCache()
    for event, mask_11NC in calls:
        if cache.get_seq_length() > event.shape.context:
            cache.crop(event.shape.context - cache.get_seq_length())
        tokens_1N = torch.full((1, event.shape.num_tokens), FILLER)
        reads = model.model if event.prefill else model
        reads(input_ids=tokens_1N, attention_mask=mask_11NC, past_key_values=cache, use_cache=True)


if __name__ == "__main__":
    main()
