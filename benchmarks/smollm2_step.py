"""Measures a training step of EAGLE-3 for SmolLM2-135M-Instruct from stored target states: `fit` against a bare PyTorch loop, in turns.

Both train the same start on the same batches, with the same optimizer and precision. The bare loop has its batches ready, computes the
target's probabilities once for each position and only on the drafter's vocabulary, and differentiates plain log-probabilities:
no trainer, no packing, no logs. A turn is a few steps of one of them.

    python benchmarks/smollm2_step.py
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from drafttrain.core.batches import DraftBatch
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import PartialTargetRows
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.training_data import TrainingData, attach_cache, prepare
from drafttrain.drafters import drafters
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.target_model import Target, TargetSettings
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"
WARM_UP = 2


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="known:smollm2", help="folder, or known:smollm2")
    parser.add_argument("--losses", nargs="+", default=["ce", "forward_kl", "lk_hybrid"])
    parser.add_argument("--depths", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16-mixed"])
    parser.add_argument("--draft-vocab-size", type=int, default=4096)
    parser.add_argument("--records", type=int, default=8, help="records of 224 tokens per step")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = Target.load(TargetSettings(model=arguments.target, dtype="bfloat16"))
    print(f"{arguments.pairs} pairs of {arguments.steps} steps of {arguments.records} x 224 tokens, ", end="")
    print(f"{arguments.threads} threads, {processor()}, commit {commit()}; CPU time\n")
    print("| loss | depths | precision | step of fit | bare loop | ratio [95 % interval] | positions per CPU second |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for depth in arguments.depths:
            start, data = started(target, Path(folder), depth, arguments)
            for kind in arguments.losses:
                for precision in arguments.precisions:
                    print(row(start, data, target, kind, depth, precision, arguments), flush=True)


def started(target: Target, folder: Path, depth: int, arguments: argparse.Namespace) -> tuple[Any, TrainingData]:
    """Return a drafter and its data: this project's documentation, with the target's outputs stored."""
    text = folder / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted(DOCS.glob("*.md"))))
    chosen = DataSettings(
        sources=[TextSettings(path=str(text))], max_length=224, cache="states", cache_dtype="bfloat16"
    )
    data = prepare(chosen, folder / "data", tokenizer=target.tokenizer, tokenizer_fingerprint="", seed=0)
    entry: Any = drafters.entry("eagle3")
    settings = entry.settings(draft_vocab_size=arguments.draft_vocab_size, num_steps=depth)
    torch.manual_seed(1)
    start = entry.component.create(settings, target=target, tokenizer=target.tokenizer)
    start.fit_vocabulary(data.label_counts)
    records = arguments.records * (arguments.steps + WARM_UP)
    attach_cache(data, folder / "data", target, num_records=records, own_vocabulary=True, needs=start.needs())
    return start, data


def row(
    start: Any,
    data: TrainingData,
    target: Target,
    kind: str,
    depth: int,
    precision: Any,
    arguments: argparse.Namespace,
) -> str:
    """Return a row of the table."""
    settings = TrainSettings(
        max_steps=arguments.steps + WARM_UP,
        batch_size=arguments.records,
        warmup_steps=1,
        eval_every_steps=0,
        loggers=["csv"],
        precision=precision,
    )
    ready = [data.of_step(step, batch_size=arguments.records) for step in range(settings.max_steps)]
    turns: dict[str, Callable[[], float]] = {
        "fit": lambda: fit_turn(copy.deepcopy(start), kind, data, target, settings, arguments),
        "bare": lambda: bare_turn(copy.deepcopy(start), kind, ready, settings, arguments),
    }
    times: dict[str, list[float]] = {"fit": [], "bare": []}
    for pair in range(arguments.pairs):
        for name in ("fit", "bare") if pair % 2 else ("bare", "fit"):
            times[name].append(turns[name]())
    ones = [1.0] * arguments.pairs
    ratio = ratio_of_ratios((times["fit"], ones), (times["bare"], ones))
    fit, bare = (sum(seconds) / (arguments.pairs * arguments.steps) for seconds in times.values())
    positions = sum(batch.weight_of_step for (batch,) in ready) / len(ready) / fit
    return (
        f"| {kind} | {depth} | {precision} | {1000 * fit:.0f} ms | {1000 * bare:.0f} ms | {ratio} | {positions:,.0f} |"
    )


def fit_turn(drafter: Any, kind: str, data: TrainingData, target: Target, settings: Any, arguments: Any) -> float:
    """Return the CPU seconds of the last steps of the trainer, between the calls that request batches."""
    called: list[float] = []

    def of_step(step: int) -> list[DraftBatch]:
        called.append(time.process_time())
        return data.of_step(step, batch_size=settings.batch_size)

    with tempfile.TemporaryDirectory() as folder:
        train(
            drafter,
            losses.build(losses.entry(kind).settings()),
            target=target,
            of_step=of_step,
            estimate=None,
            settings=settings,
            vocab_size=target.num_tokens,
            folder=Path(folder),
        )
    return called[-1] - called[-1 - arguments.steps]


def bare_turn(drafter: Any, kind: str, ready: list[list[DraftBatch]], settings: Any, arguments: Any) -> float:
    """Return the CPU seconds of the last steps of a plain loop."""
    optimizer = build_optimizer(drafter, settings)
    drafter.train()
    began = 0.0
    for step, (batch,) in enumerate(ready):
        if step == len(ready) - arguments.steps:
            began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16-mixed"):
            total = bare_loss(drafter, kind, batch)
        (total / batch.weight_of_step).backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - began


def bare_loss(drafter: Any, kind: str, batch: DraftBatch) -> Tensor:
    """Return the sum of the loss over all rows, by autograd."""
    drafted = drafter(batch)
    rows = align(drafted, batch)
    places_V = torch.full((drafter.config["vocab_size"],), -1)
    places_V[drafter.vocabulary] = torch.arange(len(drafter.vocabulary))
    log_p_TR, learnable_T = None, None
    if kind != "ce":
        assert isinstance(batch.target_rows, PartialTargetRows)
        positions_T = torch.arange(batch.tokens_BT.numel())
        seen = batch.target_rows.of_tokens(positions_T, drafter.vocabulary)
        log_p_TR, learnable_T = seen.logits_NR.float().log_softmax(dim=-1), places_V[seen.likeliest_N] >= 0
    total, first = torch.zeros(()), 0
    for depth, count in rows.counts.items():
        chosen = slice(first, first := first + count)
        states_NR = drafted.states_BTD[depth].flatten(0, 1)[rows.drafter_N[chosen]]
        logits_NR = drafted.head(states_NR, depth).float()
        if log_p_TR is None or learnable_T is None:
            loss_N = cross_entropy(logits_NR, places_V[rows.tokens_N[chosen]], ignore_index=-1, reduction="none")
        else:
            loss_N = divergence(kind, log_p_TR[rows.target_N[chosen]], logits_NR.log_softmax(dim=-1))
            loss_N = loss_N * learnable_T[rows.target_N[chosen]]
        total = total + drafted.depth_weights[depth] * loss_N.sum()
    return total


def divergence(kind: str, log_p_NR: Tensor, log_q_NR: Tensor) -> Tensor:
    """Return the loss of each row, as a reader of the paper would write it."""
    p_NR = log_p_NR.exp()
    kl_N = (p_NR * (log_p_NR - log_q_NR)).sum(dim=-1)
    if kind == "forward_kl":
        return kl_N
    accepted_N = torch.minimum(p_NR, log_q_NR.exp()).sum(dim=-1)
    share_N = torch.exp(-3.0 * accepted_N.detach())
    return share_N * kl_N + (1 - share_N) * (1 - accepted_N)


if __name__ == "__main__":
    main()
