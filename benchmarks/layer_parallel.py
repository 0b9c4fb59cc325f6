"""Measures what layers in parallel cost in acceptance: a target drafts for itself, so only its groups make it err.

Every row decodes the same prompts together. `kept` is the control: what draft tokens wrote into the cache stays where they were
accepted, instead of being calibrated.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.drafters.causal_lm.decoding import DecodingLM
from drafttrain.drafters.causal_lm.layer_parallel import LayerParallelLM
from drafttrain.eval.arms import Arm
from drafttrain.eval.evaluate import choose_drafts
from drafttrain.eval.figures import compare, prompt_counts
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.metrics import PromptCounts, totals_of
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.slices import part_of
from drafttrain.eval.statistics import ratio_interval
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--prompts", default="builtin:test")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    target = Target.load(TargetSettings(model=arguments.target, device="cpu", dtype="float32"))
    length = FixedLengthSettings(num_draft_tokens=arguments.num_draft_tokens)
    settings = EvalSettings(max_new_tokens=arguments.max_new_tokens, length=length)
    prompts = read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=48, limit=arguments.num_prompts)
    print(
        f"{arguments.target} ({target.model.config.num_hidden_layers} layers) drafts for itself, {len(prompts)} prompts of "
        f"{arguments.prompts}, {arguments.max_new_tokens} new tokens, K = {arguments.num_draft_tokens}, {processor()}, "
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}\n"
    )
    print(
        "| temperature | layer-parallel size | cache | block efficiency | less than size 1, paired | accepted, by position |"
    )
    print("|---|---|---|---|---|---|")
    for temperature in arguments.temperatures:
        usual = counts(target, prompts, settings, temperature)
        row(temperature, 1, "", usual, usual)
        for size in arguments.sizes:
            grouped = replace(settings, layer_parallel_size=size)
            row(temperature, size, "calibrated", counts(target, prompts, grouped, temperature), usual)
            with fuzzy_cache():
                row(temperature, size, "kept", counts(target, prompts, grouped, temperature), usual)
    print(f"\n{time.process_time() - began:.0f} CPU seconds")


def counts(
    target: Target, prompts: Sequence[Prompt], settings: EvalSettings, temperature: float
) -> Sequence[PromptCounts]:
    """Return the counts of every prompt, decoded by the target with itself as the drafter."""
    drafter: Drafter = read_drafter(resolve_folder(target.name), target)
    choose_drafts([drafter], settings)
    arm = Arm.create("drafter", drafter, target, Sampling(temperature), settings, length=settings.length)
    arm.generations, arm.prompts = arm.engine.generate(prompts), list(prompts)
    return prompt_counts(arm, settings)


@contextmanager
def fuzzy_cache() -> Iterator[None]:
    """Within this context what draft tokens wrote into the cache stays where they were accepted."""
    calibrating = LayerParallelLM.keep
    LayerParallelLM.keep = DecodingLM.keep  # type: ignore[method-assign]
    yield
    LayerParallelLM.keep = calibrating  # type: ignore[method-assign]


def row(
    temperature: float, size: int, cache: str, found: Sequence[PromptCounts], usual: Sequence[PromptCounts]
) -> None:
    """Print a row."""
    less = compare(usual, found).block_efficiency.text() if found is not usual else ""
    by_position = ", ".join(f"{share:.2f}" for share in totals_of(found).acceptance_by_position)
    efficiency = ratio_interval(*part_of(found)).text()
    print(f"| {temperature:g} | {size} | {cache} | {efficiency} | {less} | {by_position} |", flush=True)


if __name__ == "__main__":
    main()
