"""Compares tokens per CPU second of the built-in generation backend with another checkout of drafttrain.

Each checkout runs in its own process, one batch at a time, in turns whose order alternates. The interval of the ratio is over the
batches. Both must write the same texts, token for token.

    git worktree add ../before COMMIT
    python benchmarks/generation.py --before ../before
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

THREADS = 1


def main() -> None:
    """Measure and print the table, or with `--worker` write batches on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="Root of the other checkout.")
    parser.add_argument(
        "--model", choices=["demo", "135m"], default="demo", help="135m: random, of SmolLM2-135M's shape."
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run both checkouts in turns and print a row of the table."""
    from drafttrain.core.provenance import commit, processor
    from drafttrain.eval.statistics import ratio_of_ratios

    here = Path(__file__).parents[1]
    workers = {"before": start(arguments.before.resolve()), "after": start(here)}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    tokens: list[float] = []
    for number in range(arguments.pairs + 1):
        found = {}
        for name in list(workers)[:: 1 if number % 2 else -1]:
            found[name] = ask(workers[name], number)
        assert found["before"]["texts"] == found["after"]["texts"], (
            f"batch {number}: the checkouts wrote different texts"
        )
        if number:  # the first batch warms up
            tokens.append(found["after"]["tokens"])
            for name in workers:
                seconds[name].append(found[name]["seconds"])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ratio = ratio_of_ratios((tokens, seconds["after"]), (tokens, seconds["before"]))
    rates = [sum(tokens) / sum(seconds[name]) for name in workers]
    print(f"{processor()}, {THREADS} thread, commit {commit()}\n")
    print(
        "| model | batch | max new tokens | temperature | before, tokens per CPU second | after, tokens per CPU second | ratio [95 % interval] |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.model} | {arguments.batch_size} | {arguments.max_new_tokens} | {arguments.temperature:g} "
        f"| {rates[0]:,.0f} | {rates[1]:,.0f} | {ratio} |"
    )


def start(root: Path) -> Any:
    """Return a process that writes batches with the code under `root`."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: Any, number: int) -> dict[str, Any]:
    """Request a batch from a worker and return its answer."""
    print(number, file=worker.stdin, flush=True)
    answer: dict[str, Any] = json.loads(worker.stdout.readline())
    return answer


def work(arguments: argparse.Namespace) -> None:
    """Write the batch of each requested number."""
    import torch

    from drafttrain.core.texts import Sampling
    from drafttrain.data_gen.backends import Task
    from drafttrain.data_gen.backends.builtin import continuations

    torch.set_num_threads(THREADS)
    target = target_of(arguments.model)
    for line in sys.stdin:
        draws = torch.Generator().manual_seed(int(line))
        lengths = torch.randint(16, 64, (arguments.batch_size,), generator=draws).tolist()
        prompts = [torch.randint(400, 4000, (length,), generator=draws).tolist() for length in lengths]
        tasks = [Task(f"{line}-{i}", prompt, Sampling(arguments.temperature)) for i, prompt in enumerate(prompts)]
        began = time.process_time()
        texts = continuations(tasks, target, max_new_tokens=arguments.max_new_tokens, seed=0)
        seconds = time.process_time() - began
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        print(json.dumps({"seconds": seconds, "tokens": sum(map(len, texts)), "texts": digest}), flush=True)


def target_of(name: str) -> Any:
    """Return the demo's target, or one of SmolLM2-135M's shape, whose texts end at one token in 150."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from drafttrain.target_model import Target, TargetSettings

    demo = Target.load(TargetSettings(device="cpu"))
    if name == "demo":
        return demo
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=list(range(49_152 // 150)),
    )
    model = LlamaForCausalLM(config)
    target = Target(model, demo.tokenizer, name=name, fingerprint="")
    # Its head is random, so any of its ids can be sampled.
    type(target).num_tokens = property(lambda self: self.vocab_size)  # type: ignore[assignment, method-assign]
    return target


if __name__ == "__main__":
    main()
