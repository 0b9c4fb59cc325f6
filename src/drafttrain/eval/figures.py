"""From the rounds and forwards of an arm to its figures in the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from drafttrain.core.generations import Generation
from drafttrain.core.proposals import Exactness
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import share_of_tokens
from drafttrain.data_gen.checkers import checkers
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm, Baseline, tokens_per_second, writes_same_text
from drafttrain.eval.clock import measured, pipelined_seconds
from drafttrain.eval.interval import Interval
from drafttrain.eval.metrics import PromptCounts, Totals, counts_of, histogram, mbsu, totals_of
from drafttrain.eval.parity import parity
from drafttrain.eval.permutation import holm, permutation_p_value
from drafttrain.eval.pipelined import PIPELINED
from drafttrain.eval.proposers import TrainingFree
from drafttrain.eval.quality import TaskScore, agreement, solved, task_score
from drafttrain.eval.replay import Text, expected_rounds, mean_bound, replay_rows
from drafttrain.eval.result import (
    ComparedSlice,
    DrafterFigures,
    MacroFigures,
    PairedComparison,
    Piece,
    PlainFigures,
    RoundTimes,
    SamePrompts,
    Sample,
    Seconds,
    Speedup,
    VllmFigures,
)
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.slices import by_slice, part_of, slices_of
from drafttrain.eval.statistics import Part, means, ratio_difference, ratio_interval, ratio_of_ratios, summed_by
from drafttrain.target_model import Target

NUM_SAMPLES = 4


def prompt_counts(arm: Arm, settings: EvalSettings) -> list[PromptCounts]:
    """Return the counts of every prompt, up to the first repetition in its output."""
    return [
        counts_of(one, prompt, repetition_ngram=settings.repetition_ngram)
        for one, prompt in zip(arm.generations, arm.prompts, strict=True)
    ]


def drafter_figures(
    arm: Arm, baseline: Baseline, plain: Arm, sampling: Sampling, settings: EvalSettings
) -> DrafterFigures:
    """Return all figures of one drafter at one temperature.

    Args:
        plain: Plain decoding with the same target.
    """
    counts = prompt_counts(arm, settings)
    totals, whole = totals_of(counts), totals_of([counts_of(one) for one in arm.generations])
    ledger, lossy = arm.ledger, arm.engine.rule.exactness is Exactness.LOSSY
    greedy = sampling.temperature == 0
    alpha, bound, replay = _replayed(arm, counts, sampling, settings)
    source = arm.source
    return DrafterFigures(
        length=component_mapping(arm.length),
        block_efficiency=ratio_interval(*part_of(counts)),
        draft_acceptance_rate=totals.draft_acceptance_rate,
        acceptance_by_position=totals.acceptance_by_position,
        conditional_acceptance=totals.conditional_acceptance,
        acceptance_histogram=histogram(arm.generations),
        mbsu=mbsu(
            num_tokens=whole.num_tokens,
            num_rounds=whole.num_rounds,
            plain_bytes=ledger.plain_bytes(),
            bytes_read=ledger.bytes_read(),
        ),
        target_calls=ledger.calls("target"),
        drafter_calls=ledger.calls("drafter"),
        target_calls_per_token=whole.num_rounds / whole.num_tokens,
        discarded_draft_tokens_per_token=(whole.num_draft_tokens - whole.num_accepted) / whole.num_tokens,
        tokens_per_second=ratio_interval(*summed_by(arm.units, *arm.tokens_and_seconds())),
        speedup=speedup(arm, baseline),
        seconds=_seconds(arm.generations),
        vllm=_vllm_figures(whole),
        slices=slices_of(counts),
        draft_vocabulary_share=_draft_vocabulary_share(arm),
        prompts=counts,
        samples=[_sample(one, arm.target) for one in arm.generations[:NUM_SAMPLES]],
        replay=replay,
        exactness=arm.engine.rule.exactness.value,
        macro=_macro(arm, baseline, counts),
        alpha=alpha,
        alpha_bound=bound,
        proposer=component_mapping(source.settings) if isinstance(source, TrainingFree) else None,
        task=None if settings.checker is None else _task_score(arm, plain, settings),
        agreement=agreement(plain.generations, arm.generations, arm.units) if greedy and lossy else None,
        parity=parity(plain.generations, arm.generations, arm.target, images=arm.images)
        if greedy and not lossy
        else None,
        round=_round_times(arm),
        two_devices=_two_devices(arm, plain) if settings.schedule == PIPELINED else None,
    )


def speedup(arm: Arm, baseline: Baseline) -> Speedup:
    """Return the tokens per second of an arm over those of its baseline, on the prompts that both decoded."""
    found = ratio_of_ratios(*_speeds(arm, baseline))
    return Speedup(found.value, found.low, found.high, len(baseline.tokens), baseline=baseline.name)


def _speeds(arm: Arm, baseline: Baseline) -> tuple[Part, Part]:
    """Return tokens and seconds of an arm and of its baseline, on the prompts that both decoded."""
    same = len(baseline.tokens)
    own = [part[:same] for part in arm.tokens_and_seconds()]
    tokens, seconds, base_tokens, base_seconds = summed_by(arm.units[:same], *own, baseline.tokens, baseline.seconds)
    return (tokens, seconds), (base_tokens, base_seconds)


def _macro(arm: Arm, baseline: Baseline, counts: Sequence[PromptCounts]) -> MacroFigures:
    """Return block efficiency and speed-up with every prompt weighing the same."""
    part = part_of(counts)
    own, _ = means(part, part)
    speed = ratio_of_ratios(*means(*_speeds(arm, baseline))).interval()
    return MacroFigures(block_efficiency=ratio_interval(*own), speedup=speed)


def _seconds(generations: Sequence[Generation]) -> Seconds:
    return Seconds(
        prefill_seconds=sum(one.prefill_seconds for one in generations),
        draft_seconds=sum(one.draft_seconds for one in generations),
        verify_seconds=sum(one.verify_seconds for one in generations),
        seconds=sum(one.seconds for one in generations),
    )


def _round_times(arm: Arm) -> RoundTimes:
    """Return the time of a mean round by part: what its phases took, and how much of that were forwards."""
    ledger = arm.ledger
    target = sum(event.seconds for event in ledger.rounds("target"))
    others = sum(event.seconds for event in ledger.rounds()) - target
    drafting = sum(one.draft_seconds for one in arm.generations)
    verifying = sum(one.verify_seconds for one in arm.generations)
    per_round = 1000 / ledger.calls("target")
    return RoundTimes(
        target * per_round, others * per_round, (drafting - others) * per_round, (verifying - target) * per_round
    )


def _two_devices(arm: Arm, plain: Arm) -> float:
    """Return the time of plain decoding's forwards per token over that of this arm's, whose two models run at the same time."""
    own, alone = (sum(len(g.tokens) for g in one.generations) for one in (arm, plain))
    seconds = sum(pipelined_seconds(arm.ledger.by_round(), measured))
    return sum(event.seconds for event in plain.ledger.rounds()) / alone / (seconds / own)


def _vllm_figures(whole: Totals) -> VllmFigures:
    return VllmFigures(
        num_drafts=whole.num_rounds,
        num_draft_tokens=whole.num_draft_tokens,
        num_accepted_tokens=whole.num_accepted,
        mean_acceptance_length=1 + whole.num_accepted / whole.num_rounds,
        draft_acceptance_rate=whole.draft_acceptance_rate,
        acceptance_rate_per_position=whole.acceptance_by_position,
    )


def _replayed(
    arm: Arm, counts: Sequence[PromptCounts], sampling: Sampling, settings: EvalSettings
) -> tuple[Interval | None, float | None, dict[str, Interval]]:
    """Return the acceptance rate, its bound, and block efficiency by draft length, by replay on the emitted text.

    Neither a training-free proposer nor a drafter of strings has a distribution over the target's tokens. One whose layers run in
    parallel drafts from another distribution than that of its forward.
    """
    if not isinstance(arm.source, Drafter) or not arm.source.replayable:
        return None, None, {}
    texts = [
        Text(one.id, list(one.prompt_tokens), list(one.tokens[: count.num_tokens]), images)
        for one, count, images in zip(arm.generations, counts, arm.images, strict=True)
    ]
    rows = replay_rows(arm.target, arm.source, texts, sampling, num_depths=max(settings.replay_lengths, default=0))
    tokens, units = [len(text.new) for text in texts], arm.units
    bound = None if arm.source.vocabulary is None else mean_bound(rows)
    alpha = ratio_interval(*summed_by(units, [r.acceptance_T.sum() for r in rows], tokens))
    if arm.engine.rule.exactness is Exactness.LOSSY:
        # Replay assumes that the text was drawn from the target's distribution; that of a lossy rule was not.
        return alpha, bound, {}
    return (
        alpha,
        bound,
        {
            str(k): ratio_interval(*summed_by(units, tokens, [expected_rounds(r, k) for r in rows]))
            for k in settings.replay_lengths
        },
    )


def _task_score(arm: Arm, plain: Arm, settings: EvalSettings) -> TaskScore:
    """Return the share of prompts solved; later turns of conversations have no answer to compare with."""
    checker = checkers.build(settings.checker)
    prompts = [prompt for prompt in arm.prompts if prompt.turn == 1]
    found, own = (
        solved(checker, arm.target.tokenizer, prompts, one.generations[: len(prompts)]) for one in (arm, plain)
    )
    return task_score(found, own)


def plain_figures(plain: Arm, generated: Sequence[Generation]) -> PlainFigures:
    """Return the figures of plain decoding.

    Args:
        generated: Outputs of transformers' generate on the first prompts.
    """
    return PlainFigures(
        num_tokens=sum(len(one.tokens) for one in plain.generations),
        target_calls=plain.ledger.calls("target"),
        tokens_per_second=tokens_per_second(plain.generations),
        same_prompts=_same_prompts(plain, generated) if generated else None,
        round=_round_times(plain),
    )


def _same_prompts(plain: Arm, generated: Sequence[Generation]) -> SamePrompts:
    own = plain.generations[: len(generated)]
    pairs = zip(own, generated, strict=True)
    return SamePrompts(
        num_prompts=len(generated),
        plain_tokens_per_second=tokens_per_second(own),
        transformers_generate_tokens_per_second=tokens_per_second(generated),
        transformers_generate_equal=sum(list(one.tokens) == list(other.tokens) for one, other in pairs),
        transformers_generate_comparable=writes_same_text(plain, generated),
    )


def compare(first: Sequence[PromptCounts], second: Sequence[PromptCounts]) -> PairedComparison:
    """Return the difference in block efficiency of two drafters on the same prompts, first less second."""
    assert [c.id for c in first] == [c.id for c in second]
    parts = part_of(first), part_of(second)
    found = ratio_difference(*parts)
    return PairedComparison(
        found.interval(),
        found.p_value,
        permutation_p_value=permutation_p_value(*parts),
        macro=ratio_difference(*means(*parts)).interval(),
        slices=_compared_slices(first, second),
    )


def _compared_slices(
    first: Sequence[PromptCounts], second: Sequence[PromptCounts]
) -> dict[str, dict[str, ComparedSlice]]:
    """Return the difference in each slice; the p-values of an axis are corrected together."""

    def difference(places: Sequence[int]) -> ComparedSlice:
        parts = (part_of([counts[place] for place in places]) for counts in (first, second))
        one, other = parts
        found = ratio_difference(one, other).interval()
        return ComparedSlice(found, permutation_p_value(one, other), float("nan"))

    compared = by_slice(first, difference)
    return {
        axis: {
            label: replace(one, holm_p_value=corrected)
            for (label, one), corrected in zip(
                by_label.items(), holm([one.permutation_p_value for one in by_label.values()]), strict=True
            )
        }
        for axis, by_label in compared.items()
    }


def relative_speed(arm: Arm, other: Arm) -> Interval:
    """Return the tokens per second of an arm over those of another, on the same prompts, in turns."""
    parts = ([*summed_by(one.units, *one.tokens_and_seconds())] for one in (arm, other))
    (tokens, seconds), (other_tokens, other_seconds) = parts
    return ratio_of_ratios((tokens, seconds), (other_tokens, other_seconds)).interval()


def _draft_vocabulary_share(arm: Arm) -> float | None:
    """Return the share of the output that the drafter's vocabulary holds; None: it has the target's, or drafts any text."""
    vocabulary = None if getattr(arm.source, "drafts_strings", False) else getattr(arm.source, "vocabulary", None)
    return None if vocabulary is None else share_of_tokens([one.tokens for one in arm.generations], vocabulary)


def _sample(one: Generation, target: Target) -> Sample:
    """Return an output token by token, with who chose each: the drafter (accepted) or the target."""
    pieces = []
    for part in one.rounds:
        emitted = one.tokens[part.start : part.start + part.num_emitted]
        for place, token in enumerate(emitted):
            pieces.append(Piece(target.tokenizer.decode([token]), drafted=place < part.num_accepted))
    return Sample(one.id, target.tokenizer.decode(list(one.prompt_tokens)), pieces)
