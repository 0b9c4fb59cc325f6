"""Runs one side of loss_step.py: whole training steps of EAGLE-3, with the drafttrain that is on PYTHONPATH.

For each line on standard input it prints a line of JSON: the seconds of a turn, also by part of the step, and the losses.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.step import drafted_loss
from drafttrain.target_model import Target, TargetSettings
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.settings import TrainSettings

CASES: dict[str, dict[str, Any]] = {
    # recipes/tiny_eagle3.yaml on the embedded target.
    "tiny_eagle3": {"of_kind": {"draft_vocab_size": 1024, "num_steps": 3}, "records": 16, "length": 176, "prompt": 48},
    # The sizes of SmolLM2-135M with random weights.
    "smol_8192": {"of_kind": {"draft_vocab_size": 8192}, "records": 2, "length": 256, "prompt": 48},
    "smol_whole": {"of_kind": {}, "records": 2, "length": 256, "prompt": 48},
}
"""Settings of the drafter, records per step, tokens per record, and how many of them are not labels."""

SMOL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}


class Random(Target):
    """A random target of real sizes; its tokenizer does not matter."""

    @property
    def num_tokens(self) -> int:
        """Number of ids of its head."""
        return self.vocab_size


def target_of(case: str) -> Target:
    """Return the target of a case."""
    builtin = Target.load(TargetSettings())
    if case == "tiny_eagle3":
        return builtin
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return Random(LlamaForCausalLM(LlamaConfig(**SMOL)).eval(), builtin.tokenizer, name="smol", fingerprint="")


def main() -> None:
    """Run a turn of steps for each line that is read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, default=1, help="steps per turn")
    parser.add_argument(
        "--stored", action="store_true", help="read the target's states from a store (data.cache) instead of running it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = Step(arguments.case, stored=arguments.stored)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        began, spent = time.perf_counter(), time.process_time()
        parts: dict[str, float] = {}
        losses_of_turn = [step(parts) for _ in range(arguments.steps)]
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - spent,
            "parts": parts,
            "losses": losses_of_turn,
            "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        }
        print(json.dumps(answer), flush=True)


class Step:
    """Optimizer steps of one drafter, each on different texts."""

    def __init__(self, case: str, *, stored: bool) -> None:
        self.shape = CASES[case]
        self.target = target_of(case)
        entry: Any = drafters.entry("eagle3")
        settings = entry.settings(**self.shape["of_kind"])
        torch.manual_seed(1)
        self.drafter = entry.component.create(settings, target=self.target, tokenizer=self.target.tokenizer).train()
        self.loss = losses.build(losses.entry("lk_hybrid").settings())
        self.optimizer = build_optimizer(self.drafter, TrainSettings(lr=1e-4))
        self.number = 0
        self.seen = self._read(self._batch()) if stored else None

    def _batch(self) -> Any:
        generator = torch.Generator().manual_seed(self.number)
        count, length, prompt = (self.shape[name] for name in ("records", "length", "prompt"))
        texts = [
            torch.randint(5, self.target.num_tokens, (length,), generator=generator).tolist() for _ in range(count)
        ]
        mask = [False] * prompt + [True] * (length - prompt)
        records = [Record(str(i), text, mask) for i, text in enumerate(texts)]
        return pack(records, width=length, weight_of_step=float(count * (length - prompt)), step=self.number)[0]

    def _read(self, batch: Any) -> Any:
        needs = self.drafter.needs() | TargetNeeds(final=True)
        return self.target.read(batch.tokens_BT, batch.positions_BT, needs)

    def __call__(self, parts: dict[str, float]) -> float:
        """Take a step, add its CPU seconds to `parts`, and return its loss."""
        batch = self._batch()
        marks = [time.process_time()]
        seen = self.seen or self._read(batch)
        batch = replace(batch, target=seen, target_rows=self.target.rows_of(seen))
        marks.append(time.process_time())
        drafted = self.drafter(batch)
        marks.append(time.process_time())
        total = self._total(drafted, batch)
        marks.append(time.process_time())
        (total / batch.weight_of_step).backward()
        marks.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.process_time())
        names = ("target", "drafter", "loss", "backward", "optimizer")
        for name, (start, end) in zip(names, pairwise(marks), strict=True):
            parts[name] = parts.get(name, 0.0) + end - start
        self.number += 1
        return float(total.detach() / batch.weight_of_step)

    def _total(self, drafted: Any, batch: Any) -> Any:
        rows, sizes = align(drafted, batch), {"vocab_size": self.target.num_tokens, "measured": False}
        return drafted_loss(self.loss, drafted, rows, batch, **sizes).total


if __name__ == "__main__":
    main()
