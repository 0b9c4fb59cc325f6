"""Does a serving engine do with the exported files what the embedded evaluator did with ours? Token for token, count for count.

The evaluator decodes as the engine counts: rounds of K draft tokens. Engines differ in whether the first token of an output comes
before any draft, whether rounds draft past its end, and in which tokens end a text: `Habits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.generations import Generation
from drafttrain.core.proposals import Budget, DraftStep, More, Proposal
from drafttrain.core.roles import Proposer
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.environments.environment import ask
from drafttrain.eval.acceptance.lossless import Lossless, LosslessSettings
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.parity import Parity, parity
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.statistics import ratio_difference
from drafttrain.serving.engines import Habits, Job, Served, ServingEngine, Use
from drafttrain.target_model import Target

SAMPLED_TEMPERATURE = 1.0
LOWEST_P_VALUE = 0.01
"""Of a test that engine and evaluator accept alike; below it they are told apart."""

TOLERANCE = {torch.float32: 0.0}
"""Relative difference of the counters that is allowed at temperature 0; of types that are not named, OTHER_TOLERANCE."""

OTHER_TOLERANCE = 0.02

PLAIN = Habits()


@dataclass(frozen=True)
class Counts:
    """Counters over prompts, as vLLM names them."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]

    @property
    def block_efficiency(self) -> float:
        """1 + accepted / drafts: the engine's mean acceptance length; nan where nothing was drafted."""
        return 1 + self.num_accepted / self.num_drafts if self.num_drafts else float("nan")

    def json(self) -> dict[str, Any]:
        """Return what engine.json holds."""
        return asdict(self) | {"block_efficiency": self.block_efficiency}


@dataclass(frozen=True)
class Comparison:
    """An engine beside the evaluator."""

    engine: str
    version: str
    repaired: tuple[str, ...]
    dtype: str
    num_prompts: int
    max_new_tokens: int
    num_draft_tokens: int
    draft: str
    """At temperature > 0, on both sides: sampled or greedy."""
    lossless: Parity
    """The engine's output with the drafter against its own without."""
    same_target: Parity
    """The engine's output without a drafter against the evaluator's."""
    greedy: dict[str, Counts]
    """By side, `engine` and `evaluator`, on the prompts where both targets write the same."""
    sampled: dict[str, Counts]
    """Empty where the engine is not asked at temperature > 0; then so is what follows from it."""
    difference: dict[str, float]
    """Of the sampled block efficiency, engine less evaluator."""
    sampled_p_value: float | None
    text_p_value: float | None
    """Of that both sides' sampled texts are equally likely to the target."""
    problems: tuple[str, ...]

    def __str__(self) -> str:
        if self.problems:
            return "FAILED\n" + "\n".join(f"  {problem}" for problem in self.problems)
        theirs, ours = (self.greedy[side] for side in ("engine", "evaluator"))
        told = (
            f"passed: {self.lossless}; {theirs.num_drafts} drafts, {theirs.num_draft_tokens} draft tokens, "
            f"{theirs.num_accepted} accepted, the evaluator {ours.num_drafts}, {ours.num_draft_tokens}, {ours.num_accepted}"
        )
        if not self.sampled:
            return f"{told}; not asked at temperature > 0"
        return (
            f"{told}; at temperature {SAMPLED_TEMPERATURE:g} block efficiency {self.sampled['engine'].block_efficiency:.3f}, "
            f"the evaluator {self.sampled['evaluator'].block_efficiency:.3f}"
        )

    def json(self) -> dict[str, Any]:
        """Return what engine.json holds."""
        return {
            "engine": self.engine,
            "version": self.version,
            "repaired": list(self.repaired),
            "verdict": "failed" if self.problems else "passed",
            "problems": list(self.problems),
            "dtype": self.dtype,
            "num_prompts": self.num_prompts,
            "max_new_tokens": self.max_new_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "draft": self.draft,
            "lossless": self.lossless.json() | {"text": str(self.lossless)},
            "same_target": self.same_target.json() | {"text": str(self.same_target)},
            "greedy": {side: counts.json() for side, counts in self.greedy.items()},
            "sampled": self._sampled_json() if self.sampled else None,
        }

    def _sampled_json(self) -> dict[str, Any]:
        return {side: counts.json() for side, counts in self.sampled.items()} | {
            "temperature": SAMPLED_TEMPERATURE,
            "difference": self.difference,
            "p_value": self.sampled_p_value,
            "text_p_value": self.text_p_value,
        }


def plain_served(engine: ServingEngine, job: Job) -> list[Served]:
    """Return the engine's own greedy output, without a drafter; one answer serves all drafters of a target."""
    (greedy,) = engine.served(
        ask(engine.environment, engine.worker, engine.request(replace(job, temperatures=[0.0]), None))
    )
    return greedy


@dataclass(frozen=True)
class Side:
    """What one side, the engine or the evaluator, decoded: by prompt, in order."""

    plain: Sequence[Served]
    """Greedily, by the target alone."""
    greedy: Sequence[Served]
    sampled: Sequence[Served] = ()
    """Empty where it was not asked to sample."""


def compare_with_engine(
    engine: ServingEngine,
    exported: Path,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    num_draft_tokens: int,
    plain: Sequence[Served] | None = None,
) -> Comparison:
    """Serve prompts in an engine and decode them here, and compare.

    Args:
        exported: The folder that the engine loads.
        drafter: What the evaluator drafts with: read from the folder that was exported from.
        target: The one that the drafter stands on, also in the engine (`job.target` is its folder).
        plain: The engine's output without a drafter, where it is known already.

    Raises:
        EngineError: The engine cannot be asked.
    """
    drafter.draft = engine.draft(drafter.kind, drafter.draft)
    plain = plain if plain is not None else plain_served(engine, job)
    job = job if engine.samples else replace(job, temperatures=[0.0])
    use = Use(str(exported.resolve()), drafter.kind, num_draft_tokens, drafter.draft)
    answer = ask(engine.environment, engine.worker, engine.request(job, use))
    return compare(
        Side(plain, *engine.served(answer)),
        evaluator_side(
            target, drafter, prompts, job, num_draft_tokens=num_draft_tokens, habits=engine.habits(job.target)
        ),
        target,
        prompts,
        job,
        engine=engine.name,
        version=answer["version"],
        repaired=tuple(answer.get("repaired", ())),
        num_draft_tokens=num_draft_tokens,
        draft=drafter.draft,
    )


def evaluator_side(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    num_draft_tokens: int,
    habits: Habits = PLAIN,
) -> Side:
    """Return what the evaluator decodes and counts, as the engine does: greedily, and sampled where the job asks for it."""
    decoded = (
        [
            served_counts(one, max_new_tokens=job.max_new_tokens, habits=habits)
            for one in decode(
                target,
                drafter,
                prompts,
                sampling,
                max_new_tokens=job.max_new_tokens,
                num_draft_tokens=num_draft_tokens,
                habits=habits,
            )
        ]
        for sampling in map(Sampling, job.temperatures)
    )
    alone = _engine(target, NoDraft(), Sampling(), max_new_tokens=job.max_new_tokens, num_draft_tokens=1)
    plain = [Served(_up_to_end(one.tokens, habits.ends)) for one in alone.generate(prompts)]
    return Side(plain, *decoded)


def compare(
    theirs: Side,
    ours: Side,
    target: Target,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    engine: str,
    version: str,
    repaired: tuple[str, ...],
    num_draft_tokens: int,
    draft: str,
) -> Comparison:
    """Hold what an engine did against what the evaluator did.

    Args:
        engine: Its name, for the problems.
    """
    lossless = parity(_generations(prompts, theirs.plain), _generations(prompts, theirs.greedy), target)
    same_target = parity(_generations(prompts, ours.plain), _generations(prompts, theirs.plain), target)
    apart = {one.id for one in (*lossless.divergences, *same_target.divergences)}
    kept = [number for number, prompt in enumerate(prompts) if prompt.id not in apart]
    greedy = {"engine": theirs.greedy, "evaluator": ours.greedy}
    tolerance = TOLERANCE.get(target.model.dtype, OTHER_TOLERANCE)
    problems = [
        *_of_lossless(lossless, engine, tolerance),
        *_of_target(same_target, engine),
        *_of_counts(greedy, prompts, kept, engine, tolerance),
    ]
    sums: dict[str, Counts] = {}
    difference: dict[str, float] = {}
    p_value = text_p_value = None
    if theirs.sampled:
        sampled = {"engine": theirs.sampled, "evaluator": ours.sampled}
        sums = {side: _sum(many, num_draft_tokens) for side, many in sampled.items()}
        difference, p_value = _difference(theirs.sampled, ours.sampled)
        likelihoods = [_log_likelihoods(target, prompts, many) for many in sampled.values()]
        text_p_value = _p_value(*likelihoods)
        problems += _of_sampled(sums, p_value, likelihoods, text_p_value, engine)
    return Comparison(
        engine=engine,
        version=version,
        repaired=repaired,
        dtype=job.dtype,
        num_prompts=len(prompts),
        max_new_tokens=job.max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        draft=draft,
        lossless=lossless,
        same_target=same_target,
        greedy={side: _sum([many[number] for number in kept], num_draft_tokens) for side, many in greedy.items()},
        sampled=sums,
        difference=difference,
        sampled_p_value=p_value,
        text_p_value=text_p_value,
        problems=tuple(problems),
    )


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    habits: Habits = PLAIN,
) -> list[Generation]:
    """Return outputs as an engine makes them: a first token of the target's own, then rounds of K draft tokens, to past the end.

    Their `prompt_tokens` are those that were given; rounds start behind the first token, where it comes alone.
    """
    lengths = {"num_draft_tokens": num_draft_tokens}
    alone = int(habits.first_alone)
    first = _engine(target, NoDraft(), sampling, max_new_tokens=1, seed=1, **lengths).generate(prompts)
    begun = [list(one.tokens[:alone]) for one in first]
    longer = [replace(prompt, tokens=[*prompt.tokens, *tokens]) for prompt, tokens in zip(prompts, begun, strict=True)]
    # One round past the end at most, and it drafts as many tokens as any other.
    most = max_new_tokens + num_draft_tokens if habits.past_end else max_new_tokens - alone
    proposer = drafter.proposer(target)
    if habits.draft_top_k:
        proposer = Narrowed(proposer, habits.draft_top_k)
    engine = _engine(target, proposer, sampling, max_new_tokens=most, **lengths)
    rest = [engine.generate([prompt])[0] for prompt in longer]
    return [
        replace(one, prompt_tokens=prompt.tokens, tokens=[*tokens, *one.tokens])
        for prompt, tokens, one in zip(prompts, begun, rest, strict=True)
    ]


def _engine(
    target: Target, proposer: Any, sampling: Sampling, *, max_new_tokens: int, num_draft_tokens: int, seed: int = 0
) -> Engine:
    return Engine(
        target,
        proposer,
        rule=Lossless(LosslessSettings()),
        policy=FixedLength(FixedLengthSettings(num_draft_tokens)),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_tokens=(),
    )


class Narrowed:
    """A proposer that samples from some likeliest tokens of its law alone, as an engine makes it do."""

    def __init__(self, proposer: Proposer, top_k: int) -> None:
        self.needs = proposer.needs
        self.begin, self.observe, self.drop = proposer.begin, proposer.observe, proposer.drop
        self._proposer = proposer
        self._top_k = top_k

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return proposals drawn from what is left of its law."""
        return self._proposer.propose(budgets, replace(sampling, top_k=self._top_k), generators, more)


def _up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Return a text up to the first token that ends one, which is its last."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: end + 1])


def served_counts(generation: Generation, *, max_new_tokens: int, habits: Habits = PLAIN) -> Served:
    """Return the counters of an output of `decode`: of the drafts that are made before its last token is there."""
    tokens = _up_to_end(generation.tokens[:max_new_tokens], habits.ends)
    begun = int(habits.first_alone)
    rounds = [one for one in generation.rounds if one.num_draft_tokens and begun + one.start < len(tokens)]
    # Of what a round gives, one token was not drafted: where all that counts is what is written, the last one.
    most = [len(tokens) - 1 - begun - one.start for one in rounds]
    kept = [
        one.num_accepted if habits.past_end else min(one.num_accepted, limit)
        for one, limit in zip(rounds, most, strict=True)
    ]
    deepest = max((one.max_depth for one in rounds), default=0)
    return Served(
        tokens=tokens,
        num_drafts=len(rounds),
        num_draft_tokens=sum(one.num_draft_tokens for one in rounds),
        num_accepted=sum(kept),
        accepted_at=[sum(count >= i for count in kept) for i in range(1, deepest + 1)],
    )


def _generations(prompts: Sequence[Prompt], served: Sequence[Served]) -> list[Generation]:
    return [
        Generation(prompt.id, prompt.domain, prompt.tokens, list(one.tokens), [], 0.0, 0.0, 0.0, 0.0)
        for prompt, one in zip(prompts, served, strict=True)
    ]


def _sum(many: Sequence[Served], num_draft_tokens: int) -> Counts:
    return Counts(
        num_drafts=sum(one.num_drafts for one in many),
        num_draft_tokens=sum(one.num_draft_tokens for one in many),
        num_accepted=sum(one.num_accepted for one in many),
        accepted_at=tuple(
            sum(one.accepted_at[i] for one in many if i < len(one.accepted_at)) for i in range(num_draft_tokens)
        ),
    )


def _difference(engine: Sequence[Served], evaluator: Sequence[Served]) -> tuple[dict[str, float], float]:
    """Return by how much the engine keeps more draft tokens a round, and the p-value of that it does not, over prompts.

    Texts that ended before any draft say nothing of it.
    """
    both = [(a, b) for a, b in zip(engine, evaluator, strict=True) if a.num_drafts and b.num_drafts]
    if not both:
        return {}, 1.0
    engine, evaluator = zip(*both, strict=True)
    parts = [([one.num_accepted for one in many], [one.num_drafts for one in many]) for many in (engine, evaluator)]
    found = ratio_difference(*parts)
    return found.json(), found.p_value


@torch.no_grad()
def _log_likelihoods(target: Target, prompts: Sequence[Prompt], served: Sequence[Served]) -> list[float]:
    """Return the mean log-likelihood of the tokens of each text, as the target draws them."""
    found = []
    for prompt, one in zip(prompts, served, strict=True):
        tokens = torch.tensor([[*prompt.tokens, *one.tokens]], device=target.device)
        # Padding included: an engine that does not know it may draw it.
        logits_NV = target.model(tokens).logits[0, len(prompt.tokens) - 1 : -1]
        law_NV = (logits_NV.float() / SAMPLED_TEMPERATURE).log_softmax(dim=-1)
        found.append(float(law_NV.gather(1, tokens[0, len(prompt.tokens) :, None]).mean()))
    return found


def _p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of that two figures of the same prompts are the same."""
    ones = [1] * len(first)
    return ratio_difference((first, ones), (second, ones)).p_value


def _of_lossless(found: Parity, engine: str, tolerance: float) -> list[str]:
    excused = tolerance > 0 and all(one.near_tie for one in found.divergences)
    return (
        [] if found.exact or excused else [f"{engine} with the drafter does not write what it writes without: {found}"]
    )


def _of_target(found: Parity, engine: str) -> list[str]:
    if all(one.near_tie for one in found.divergences):
        return []
    return [f"{engine} does not write what the evaluator's target writes: {found}"]


def _of_counts(
    both: Mapping[str, Sequence[Served]],
    prompts: Sequence[Prompt],
    kept: Sequence[int],
    engine: str,
    tolerance: float,
) -> list[str]:
    """Return where the counters differ: in total, and the first prompt."""
    if not any(both["evaluator"][i].num_drafts for i in kept):
        return [f"{engine}: no prompt is left on which the counters could be compared"]
    if not any(both["engine"][i].num_drafts for i in kept):
        return [f"{engine} did not draft: its counters are zero"]
    if tolerance:
        sides = [1 + sum(m[i].num_accepted for i in kept) / sum(m[i].num_drafts for i in kept) for m in both.values()]
        far = abs(sides[0] / sides[1] - 1) > tolerance
        return [
            f"{engine}: block efficiency {sides[0]:.3f}, evaluator {sides[1]:.3f}: more than {tolerance:.0%} apart"
        ] * far
    wrong = [i for i in kept if _numbers(both["engine"][i]) != _numbers(both["evaluator"][i])]
    if not wrong:
        return []
    theirs, ours = (_numbers(both[side][wrong[0]]) for side in ("engine", "evaluator"))
    return [
        f"{engine} drafts otherwise than the evaluator in {len(wrong)} of {len(kept)} prompts; in {prompts[wrong[0]].id!r} its "
        f"drafts, draft tokens, accepted and accepted by position are {theirs}, the evaluator's {ours}"
    ]


def _of_sampled(
    sums: Mapping[str, Counts],
    p_value: float,
    likelihoods: Sequence[Sequence[float]],
    text_p_value: float,
    engine: str,
) -> list[str]:
    """Return where acceptance or text at temperature > 0 is told apart from the evaluator's."""
    found = []
    if sums["evaluator"].num_drafts and not sums["engine"].num_drafts:
        found.append(f"at temperature {SAMPLED_TEMPERATURE:g} {engine} did not draft: its counters are zero")
    if p_value < LOWEST_P_VALUE:
        found.append(
            f"at temperature {SAMPLED_TEMPERATURE:g} {engine} accepts otherwise than the evaluator: block efficiency "
            f"{sums['engine'].block_efficiency:.3f}, evaluator {sums['evaluator'].block_efficiency:.3f}, p = {p_value:.2g}"
        )
    if text_p_value < LOWEST_P_VALUE:
        means = [sum(values) / len(values) for values in likelihoods]
        found.append(
            f"at temperature {SAMPLED_TEMPERATURE:g} {engine} does not write the target's law: mean log-likelihood of a token "
            f"{means[0]:.2f}, of the evaluator's text {means[1]:.2f}, p = {text_p_value:.2g}"
        )
    return found


def _numbers(one: Served) -> tuple[int, int, int, list[int]]:
    accepted_at = list(one.accepted_at)
    while accepted_at and accepted_at[-1] == 0:
        accepted_at.pop()
    return one.num_drafts, one.num_draft_tokens, one.num_accepted, accepted_at
