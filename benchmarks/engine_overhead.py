"""Measures the overhead of the evaluator's loop over its forward passes, compared with Hugging Face's assisted generation.

The bare forward passes are the loop's own calls (models, tokens, cache lengths), repeated with plain transformers caches that are
cropped. They include no sampling, no verification and no bookkeeping. Loop, bare forward passes and Hugging Face take turns, prompt
by prompt.
"""

import argparse
import json
import time
from importlib import resources
from pathlib import Path

import torch
from transformers import DynamicCache

from drafttrain.checkpoint import read_drafter
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.target_model import Target, TargetSettings


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--prompts", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = Target.load(TargetSettings(model=arguments.target))
    drafter = read_drafter(arguments.drafter, target)
    path = resources.files("drafttrain") / "eval" / "prompts_data" / "validation.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][: arguments.prompts + 1]
    prompts = [Prompt(line["id"], target.tokenizer(line["text"]).input_ids[:48]) for line in lines]
    ledger = Ledger()
    engine = Engine(
        target,
        drafter.proposer(target, ledger.append),
        rule=Lossless(),
        policy=FixedLength(),
        sampling=Sampling(),
        max_new_tokens=64,
        stop_tokens=(),
        listener=ledger.append,
    )
    models = {"target": target.model, "drafter": drafter.model}
    times: dict[str, list[float]] = {"loop": [], "bare": [], "hf": []}
    for number, prompt in enumerate(prompts):
        ledger.events.clear()
        began = time.perf_counter()
        engine.generate([prompt])
        loop = time.perf_counter() - began
        events = list(ledger.events)
        turns = [lambda p=prompt: hf(p, models), lambda e=events: bare(e, models)]
        second, first = (turn() for turn in (turns if number % 2 else reversed(turns)))
        bare_seconds, hf_seconds = (first, second) if number % 2 else (second, first)
        if number:  # the first prompt warms up
            times["loop"].append(loop)
            times["bare"].append(bare_seconds)
            times["hf"].append(hf_seconds)
    ones = [1.0] * len(times["bare"])
    print(f"{len(ones)} prompts, 64 new tokens, K = 5, greedy, 1 thread, {processor()}, commit {commit()}\n")
    print("| time / time of the bare forward passes | ratio [95 % interval] |\n|---|---|")
    for name, label in (("loop", "the evaluator's loop"), ("hf", "transformers generate(assistant_model=...)")):
        ratio = ratio_of_ratios((times[name], ones), (times["bare"], ones))
        print(f"| {label} | {ratio} |")
    print("\nThe second ratio is the speed-up over Hugging Face's loop that a loop without any overhead would reach.")


@torch.no_grad()
def bare(events: list, models: dict) -> float:  # type: ignore[type-arg]
    """Return the seconds of the same forward passes alone."""
    caches = {name: DynamicCache() for name in models}
    began = time.perf_counter()
    for event in events:
        cache = caches[event.model]
        if cache.get_seq_length() > event.shape.context:
            cache.crop(event.shape.context - cache.get_seq_length())
        tokens = torch.full((1, event.shape.num_tokens), 5)
        model = models[event.model]
        (model.model if event.prefill else model)(input_ids=tokens, past_key_values=cache, use_cache=True)
    return time.perf_counter() - began


@torch.no_grad()
def hf(prompt: Prompt, models: dict) -> float:  # type: ignore[type-arg]
    """Return the seconds of Hugging Face's assisted generation of the same prompt."""
    tokens = torch.tensor([list(prompt.tokens)])
    assistant = models["drafter"]
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    began = time.perf_counter()
    models["target"].generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        assistant_model=assistant,
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
