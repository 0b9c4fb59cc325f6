"""Compares the speed-up that `drafttrain advise --gpu here` predicts with the measured one, over draft lengths.

Predicted: acceptance by replay on the text of plain decoding, times of lone forwards and of lone rounds of 3 and 6 draft tokens.
Measured: plain decoding and every length decode the same prompts in turns; time of a prompt without its prefill.
All times are CPU seconds of the process with one thread, because the machine is shared: a wall clock would also measure the others.
"""

import argparse
import time

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import folders_of
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.eval.advice import Candidate, Device, Recorded
from drafttrain.eval.arms import Arm, decode
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.lone_rounds import calibrated, lone_rounds
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.replay import Text, expected_rounds, replay_rows
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.statistics import ratio_interval, ratio_of_ratios
from drafttrain.target_model import Target, TargetSettings

LENGTHS = (1, 2, 4, 8)
WITHIN = 0.15


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter")
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--prompts", default="builtin:test")
    parser.add_argument("--number", type=int, default=12)
    parser.add_argument("--new", type=int, default=48)
    arguments = parser.parse_args()
    time.perf_counter = time.process_time  # of spans and lone rounds too
    torch.set_num_threads(1)
    target = Target.load(TargetSettings(model=arguments.target))
    drafter = read_drafter(folders_of([arguments.drafter])[0], target)
    # The first prompt calibrates; the others are decoded.
    first, *prompts = read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=48, limit=arguments.number + 1)
    settings = EvalSettings(temperatures=[0.0], max_new_tokens=arguments.new)
    sampling = Sampling()
    here = calibrated(drafter, target, first, settings)
    device = Device("here", here.clock, "", host=here.host, plain_host=here.plain_host)
    lengths = [FixedLengthSettings(count) for count in LENGTHS]
    plain = Arm.create("plain", PLAIN, target, sampling, settings, length=settings.length)
    arms = [Arm.create(f"K {one.num_draft_tokens}", drafter, target, sampling, settings, length=one) for one in lengths]
    decode([plain, *arms], prompts, settings, generate=0)
    texts = [Text(one.id, list(one.prompt_tokens), list(one.tokens)) for one in plain.generations]
    rows = replay_rows(target, drafter, texts, sampling, num_depths=max(LENGTHS))
    (plain_round,) = lone_rounds(PLAIN, target, first, settings, length=settings.length, count=1)
    memory = DecodingMemory.of(target, drafter, sampling, plain_round.forwards)
    context = sum(len(text.prompt) + len(text.new) // 2 for text in texts) // len(texts)
    print(
        f"| drafter | K | tokens a call, replay | predicted | measured | predicted / measured | within {WITHIN:.0%} |"
    )
    print("|---|---|---|---|---|---|---|")
    for length, arm in zip(lengths, arms, strict=True):
        count = length.num_draft_tokens
        tau = ratio_interval([len(text.new) for text in texts], [expected_rounds(row, count) for row in rows])
        rounds = lone_rounds(drafter, target, first, settings, length=length)
        one = Candidate({}, tau, True, rounds)
        recorded = Recorded([one], plain_round.forwards[-1], memory)
        predicted = recorded.predicted(one, device, batch=1, context=context).speedup
        found = ratio_of_ratios(_decoded(arm), _decoded(plain))
        off = predicted.value / found.value - 1
        verdict = "yes" if abs(off) <= WITHIN else f"no ({off:+.0%})"
        if (found.high - found.low) / 2 > WITHIN * found.value:
            verdict = "not resolved: the interval is wider"
        print(
            f"| {arguments.drafter} ({drafter.kind}) | {count} | {tau.value:.2f} | {predicted.value:.2f} | {found.interval().text()} "
            f"| {predicted.value / found.value:.2f} | {verdict} |",
            flush=True,
        )
    print(
        f"\n{time.strftime('%Y-%m-%d')}, commit {commit()}, {processor()}, one thread, CPU seconds, {len(prompts)} prompts"
    )


def _decoded(arm: Arm) -> tuple[list[int], list[float]]:
    """Return new tokens and time without prefill of each prompt."""
    made = arm.generations
    return [len(one.tokens) for one in made], [one.seconds - one.prefill_seconds for one in made]


if __name__ == "__main__":
    main()
