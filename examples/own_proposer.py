"""Decode with a proposer of your own: here, repeat the token that followed the last token most often so far.

    python examples/own_proposer.py [--target MODEL]

The engine verifies whatever a proposer drafts, so the text is the target's own: the script checks it.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

import drafttrain
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict, fixed_chain
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import NoDraft


class MostFrequentFollower:
    """Drafts the most frequent follower of the last token, again and again."""

    needs = TargetNeeds()

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new sequences."""
        self._contexts = list(contexts)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return a chain for each sequence."""
        return [
            fixed_chain(context.tokens[-1], followers(context.tokens, budget.depth))
            for context, budget in zip(self._contexts, budgets, strict=True)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Do nothing: the contexts already hold the emitted tokens."""

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[row] for row in keep]


def followers(tokens: Sequence[int], count: int) -> list[int]:
    """Return a chain of most frequent followers, shorter where a token was never followed."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for token, follower in pairwise(tokens):
        counts[token][follower] += 1
    chain, last = [], tokens[-1]
    while len(chain) < count and counts[last]:
        last = counts[last].most_common(1)[0][0]
        chain.append(last)
    return chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--num-prompts", type=int, default=8)
    arguments = parser.parse_args()
    target = drafttrain.load_target(arguments.target)
    prompts = read_prompts("builtin:test", target.tokenizer, prompt_tokens=48, limit=arguments.num_prompts)

    def decode(proposer: object) -> list:
        policy = FixedLength(FixedLengthSettings(num_draft_tokens=4))
        engine = Engine(target, proposer, rule=Lossless(), policy=policy, sampling=Sampling(), max_new_tokens=64)
        return engine.generate(prompts)

    drafted, plain = decode(MostFrequentFollower()), decode(NoDraft())
    assert [one.tokens for one in drafted] == [one.tokens for one in plain], "decoding is not lossless"
    num_tokens, rounds = sum(len(one.tokens) for one in drafted), sum(len(one.rounds) for one in drafted)
    print(f"{num_tokens} tokens in {rounds} target calls: block efficiency {num_tokens / rounds:.2f}, text unchanged")


if __name__ == "__main__":
    main()
