"""The loop: propose, one target call over all nodes of all sequences, verify, commit, observe.

N = nodes, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drafttrain.core.console import say_once
from drafttrain.core.device_time import Span
from drafttrain.core.generations import Generation, Round
from drafttrain.core.proposals import Budget, Context, Proposal, Verdict
from drafttrain.core.random import stream
from drafttrain.core.roles import (
    AcceptanceRule,
    BudgetsBatch,
    DraftsInTarget,
    DraftsWithOwnCache,
    ForwardListener,
    LengthPolicy,
    Proposer,
    SchedulesBatch,
)
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM

RoundListener = Callable[[Context, Round], None]
"""Is called after every round of a sequence; the context contains the tokens of that round."""
Prefill = Callable[[CachedLM, Sequence[Prompt], TargetNeeds], list[TargetOutput]]
"""Reads prompts without their last tokens, and decides what of them stays in the cache."""


def whole_prompts(lm: CachedLM, prompts: Sequence[Prompt], needs: TargetNeeds) -> list[TargetOutput]:
    """Read prompts, and keep all of them."""
    tokens, images = [prompt.tokens[:-1] for prompt in prompts], [prompt.images for prompt in prompts]
    return lm.begin(tokens, needs=needs, images=images)


@dataclass
class Decoding:
    """One prompt that is being decoded."""

    prompt: Prompt
    context: Context
    draft_stream: torch.Generator
    verdict_stream: torch.Generator
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def num_new(self) -> int:
        return len(self.context.tokens) - self.context.num_prompt_tokens

    @property
    def ended(self) -> bool:
        return bool(self.rounds) and self.rounds[-1].reason in ("eos", "length")


class Engine:
    """Decodes prompts with a proposer; `NoDraft` gives plain autoregressive decoding.

    Args:
        max_new_tokens: Most new tokens per prompt; no round drafts past them.
        seed: Every prompt has its own random streams for drafting and for verdicts, named by (seed, prompt id).
        stop_tokens: Tokens that end a text; None: the target's own.
        prefill: How the target reads prompts. Outputs are the target's only if it keeps all of them.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        *,
        rule: AcceptanceRule,
        policy: LengthPolicy,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        listener: ForwardListener | None = None,
        stop_tokens: Sequence[int] | None = None,
        prefill: Prefill = whole_prompts,
    ) -> None:
        self.proposer = proposer
        self.rule = rule
        self.policy = policy
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._lm = target.decoder(listener=listener)
        if isinstance(proposer, DraftsInTarget):
            proposer.share(self._lm)
        self._stop_tokens = frozenset(target.eos_token_ids if stop_tokens is None else stop_tokens)
        self._num_tokens = target.num_tokens
        self._prefill = prefill
        self._clock = _Clock(self._lm.device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, on_round: RoundListener | None = None) -> list[Generation]:
        """Decode prompts together, or one at a time where a model cannot batch them; return the outputs in order.

        Args:
            on_round: Called after every round of every sequence. If it raises, the decoding ends there.
        """
        if len(prompts) > 1 and (why := self._why_alone(prompts)):
            say_once(f"prompts are decoded one at a time: {why}")
            return [generation for prompt in prompts for generation in self.generate([prompt], on_round=on_round)]
        sequences = self.begin(prompts)
        live = sequences
        while live:
            self.advance(live)
            if on_round is not None:
                for sequence in live:
                    on_round(sequence.context, sequence.rounds[-1])
            ongoing = [row for row, sequence in enumerate(live) if not sequence.ended]
            if len(ongoing) < len(live):
                live = [live[row] for row in ongoing]
                self._lm.drop(ongoing)
                self.proposer.drop(ongoing)
        self._clock.settle()
        return [_generation(sequence) for sequence in sequences]

    @property
    def lm(self) -> CachedLM:
        """The target and its cache: between two rounds it contains all of a text but the last token."""
        return self._lm

    def begin(self, prompts: Sequence[Prompt]) -> list[Decoding]:
        """Read prompts; `advance` continues their texts. Where others write to the text too, both caches must follow it."""
        sequences = [self._sequence(prompt) for prompt in prompts]
        self._clock = _Clock(self._lm.device)
        with self._clock.phase("prefill_seconds", sequences):
            seen = self._prefill(self._lm, prompts, self.proposer.needs)
            self.proposer.begin([sequence.context for sequence in sequences], seen)
        return sequences

    def _why_alone(self, prompts: Sequence[Prompt]) -> str | None:
        """Return why these prompts cannot be decoded together; None: they can."""
        longest = max(len(prompt.tokens) for prompt in prompts) + self.max_new_tokens
        if why := self._lm.why_one_at_a_time(longest):
            return f"target: {why}"
        if isinstance(self.proposer, DraftsWithOwnCache) and (why := self.proposer.why_one_at_a_time(longest)):
            return f"drafter: {why}"
        return None

    def advance(self, live: list[Decoding]) -> None:
        """Run one round."""
        with self._clock.phase("draft_seconds", live):
            proposals = self.proposer.propose(
                self._budgets(live),
                self.sampling,
                [sequence.draft_stream for sequence in live],
                self.policy.more,
            )
            if isinstance(self.policy, SchedulesBatch):
                counts = self.policy.schedule(len(live))
                proposals = [one.first(count) for one, count in zip(proposals, counts, strict=True)]
        with self._clock.phase("verify_seconds", live):
            nodes, trees = zip(*(proposal.read() for proposal in proposals), strict=True)
            states = [proposal.resume for proposal in proposals]
            needs = replace(self.proposer.needs | self.rule.needs, logits=True)
            seen = self._lm.forward(nodes, parents=trees, needs=needs, resume=states)
            verdicts = [
                self._verdict(sequence, proposal, output)
                for sequence, proposal, output in zip(live, proposals, seen, strict=True)
            ]
            # An accepted leaf that the call did not read is the next round's root.
            read = [
                [node for node in verdict.path if node < proposal.num_read]
                for verdict, proposal in zip(verdicts, proposals, strict=True)
            ]
            self._lm.keep(read)
            for sequence, verdict in zip(live, verdicts, strict=True):
                _commit(sequence, verdict)
                self.policy.observe(verdict)
        with self._clock.phase("draft_seconds", live):
            self.proposer.observe(verdicts, [_at(output, path) for output, path in zip(seen, read, strict=True)])

    def _budgets(self, live: Sequence[Decoding]) -> list[Budget]:
        """Return the budget of each sequence in a round; the target's own token needs one of the remaining tokens."""
        contexts = [sequence.context for sequence in live]
        if isinstance(self.policy, BudgetsBatch):
            wanted = self.policy.budgets(contexts)
        else:
            wanted = [self.policy.budget(context) for context in contexts]
        left = [self.max_new_tokens - sequence.num_new - 1 for sequence in live]
        return [budget.within(most) for budget, most in zip(wanted, left, strict=True)]

    def _verdict(self, sequence: Decoding, proposal: Proposal, output: TargetOutput) -> Verdict:
        assert output.logits_BTV is not None
        target_probs = TargetProbs(output.logits_BTV[0], self.sampling, num_tokens=self._num_tokens)
        path, token = self.rule(
            proposal, target_probs, _state_for_rule(self.rule.needs, output), sequence.verdict_stream
        )
        drafted = proposal.tokens_N.tolist()
        tokens = [*(drafted[node] for node in path[1:]), *([] if token is None else [token])]
        tested = _tested(proposal.parents_N.tolist(), path)
        reason = "reject" if len(tested) == len(path) else "leaf"
        end = next((place for place, emitted in enumerate(tokens) if emitted in self._stop_tokens), None)
        if end is not None:
            # An accepted end of text cuts the block: tokens after it are neither accepted nor emitted.
            tokens, path, reason = tokens[: end + 1], path[: end + 2], "eos"
        elif sequence.num_new + len(tokens) >= self.max_new_tokens:
            reason = "length"
        return Verdict(path, tokens, reason, proposal, tested)

    def _sequence(self, prompt: Prompt) -> Decoding:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id!r} is empty: it needs at least one token")
        return Decoding(
            prompt,
            Context(prompt.id, list(prompt.tokens), len(prompt.tokens)),
            draft_stream=stream(self.seed, "draft", prompt.id),
            verdict_stream=stream(self.seed, "verdict", prompt.id),
        )


def _commit(sequence: Decoding, verdict: Verdict) -> None:
    start = sequence.num_new
    sequence.context.tokens.extend(verdict.tokens)
    sequence.rounds.append(
        Round(
            start=start,
            num_draft_tokens=verdict.num_draft_tokens,
            max_depth=verdict.max_depth,
            num_accepted=verdict.num_accepted,
            num_emitted=len(verdict.tokens),
            reason=verdict.reason,
        )
    )


def _tested(parents: Sequence[int], path: Sequence[int]) -> list[tuple[int, bool]]:
    """Return, by node of a path that has children, how many of them were rejected, and whether the next one was accepted."""
    found = []
    for node, accepted in zip(path, [*path[1:], None], strict=True):
        children = [child for child, parent in enumerate(parents) if parent == node]
        if accepted is not None:
            found.append((children.index(accepted), True))
        elif children:
            found.append((len(children), False))
    return found


def _state_for_rule(needs: TargetNeeds, output: TargetOutput) -> Tensor | None:
    """Return the one hidden state that the acceptance rule reads, by node."""
    if needs.hidden:
        return output.hidden_BTD[needs.hidden[0]][0]
    return output.final_BTD[0] if needs.final and output.final_BTD is not None else None


def _at(output: TargetOutput, path: Sequence[int]) -> TargetOutput:
    """Return the target's states at the nodes of a path, with the logits of all nodes."""
    if not output.hidden_BTD and output.final_BTD is None:
        return output
    states = [*output.hidden_BTD.values(), *([] if output.final_BTD is None else [output.final_BTD])]
    # The path of a chain is a prefix; that of a tree is copied to the device once.
    prefix = list(path) == list(range(len(path)))
    nodes = slice(len(path)) if prefix else torch.tensor(list(path)).to(states[0].device)
    return TargetOutput(
        logits_BTV=output.logits_BTV,
        hidden_BTD={index: state[:, nodes] for index, state in output.hidden_BTD.items()},
        final_BTD=None if output.final_BTD is None else output.final_BTD[:, nodes],
    )


def _generation(sequence: Decoding) -> Generation:
    return Generation(
        id=sequence.prompt.id,
        domain=sequence.prompt.domain,
        prompt_tokens=sequence.prompt.tokens,
        tokens=sequence.context.tokens[sequence.context.num_prompt_tokens :],
        rounds=sequence.rounds,
        prefill_seconds=sequence.prefill_seconds,
        draft_seconds=sequence.draft_seconds,
        verify_seconds=sequence.verify_seconds,
        seconds=sequence.seconds,
    )


class _Clock:
    """Times of the phases of a decoding, each divided equally among the sequences that took part.

    Times are read at the end, so that the loop never waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[tuple[Span, str, Sequence[Decoding]]] = []

    @contextmanager
    def phase(self, kind: str, sequences: Sequence[Decoding]) -> Iterator[None]:
        """Time the block as one phase of these sequences."""
        span = Span(self._device)
        yield
        self._phases.append((span.end(), kind, sequences))

    def settle(self) -> None:
        """Add all times to their phase and to the total of each sequence."""
        _ = self._phases[-1][0].seconds  # the device reaches the last one last: waiting for it is enough
        for span, kind, sequences in self._phases:
            share = span.seconds / max(1, len(sequences))
            for sequence in sequences:
                setattr(sequence, kind, getattr(sequence, kind) + share)
                sequence.seconds += share
