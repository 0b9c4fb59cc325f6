"""Measures a training step of EAGLE-3 for SmolLM2-135M-Instruct from stored target states: `fit` against a bare PyTorch loop, in turns.

Both train the same start on the same batches, with the same optimizer and precision. The bare loop has its batches ready and does
the same work without trainer, packing and logs: it calls the drafter's module, computes the target's probabilities once for each
position, only on the drafter's vocabulary and in pieces that fit the processor's caches, and has the gradient of head and loss written
out by hand. Before anything is timed, its gradients are compared with those of `fit`. A turn is a few steps of one of them.

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
from step_ends import step_ends
from torch import Tensor

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
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target, TargetSettings
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings

PIECE = 512
"""Positions whose logits exist at once in the bare loop."""
SAME = 1e-3
"""Largest relative difference of its gradients, which are computed in float32."""
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
    parser.add_argument("--dtype", default="bfloat16", help="of the target's head")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = Target.load(TargetSettings(model=arguments.target, dtype=arguments.dtype))
    print(f"{arguments.pairs} pairs of {arguments.steps} steps of {arguments.records} x 224 tokens, ", end="")
    print(f"{arguments.threads} threads, {arguments.dtype}, {processor()}, commit {commit()}; CPU time\n")
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
    (batch,) = ready[0]
    assert (found := largest_difference(start, kind, batch, target)) < SAME, (
        f"other gradients than those of fit: {found}"
    )
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
    """Return the CPU seconds of the last steps of the trainer, from the end of a step to that of the last."""

    def of_step(step: int) -> list[DraftBatch]:
        return data.of_step(step, batch_size=settings.batch_size)

    with tempfile.TemporaryDirectory() as folder, step_ends(time.process_time) as ends:
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
    assert len(ends) == settings.max_steps, "one end a step"
    return ends[-1] - ends[-1 - arguments.steps]


def bare_turn(drafter: Any, kind: str, ready: list[list[DraftBatch]], settings: Any, arguments: Any) -> float:
    """Return the CPU seconds of the last steps of a plain loop."""
    optimizer = build_optimizer(drafter, settings)
    drafter.train()
    began = 0.0
    for step, (batch,) in enumerate(ready):
        if step == len(ready) - arguments.steps:
            began = time.process_time()
        bare_backward(drafter, kind, batch, settings.precision)
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - began


def bare_backward(drafter: Any, kind: str, batch: DraftBatch, precision: str) -> None:
    """Set the gradients of a batch: the module and its backward pass by autograd, head and loss by hand."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        drafted = drafter(batch)
        rows = align(drafted, batch)
        own_N, entering, first = {}, {}, 0
        for depth, count in rows.counts.items():
            own_N[depth] = slice(first, first := first + count)
            states_RD = drafted.states_BTD[depth].flatten(0, 1)
            entering[depth] = drafter.norm(states_RD[rows.drafter_N[own_N[depth]]])
    gradients = {depth: torch.empty_like(state_ND) for depth, state_ND in entering.items()}
    matrix = drafter.lm_head.weight
    matrix.grad = torch.zeros_like(matrix)
    matrix_RD = matrix.detach().to(dtype)
    places_V = torch.full((drafter.config["vocab_size"],), -1)
    places_V[drafter.vocabulary] = torch.arange(len(drafter.vocabulary))
    with torch.no_grad():
        for first in range(0, batch.tokens_BT.numel(), PIECE):
            target = None if kind == "ce" else target_piece(batch, drafter.vocabulary, places_V, first)
            for depth, state_ND in entering.items():
                # The rows of a depth are sorted by position.
                targets_N = rows.target_N[own_N[depth]]
                chosen = slice(*torch.searchsorted(targets_N, torch.tensor([first, first + PIECE])).tolist())
                labels_n = places_V[rows.tokens_N[own_N[depth]][chosen]]
                weight = drafted.depth_weights[depth] / batch.weight_of_step
                state_nD = state_ND[chosen].to(dtype)
                gradient_nR = weight * logit_gradient(
                    kind, (state_nD @ matrix_RD.t()).float(), labels_n, target, targets_N[chosen] - first
                )
                gradient_nR = gradient_nR.to(dtype)
                matrix.grad += gradient_nR.t() @ state_nD
                gradients[depth][chosen] = (gradient_nR @ matrix_RD).to(state_ND.dtype)
    torch.autograd.backward(list(entering.values()), list(gradients.values()))


def target_piece(batch: DraftBatch, ids_R: Tensor, places_V: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return (probabilities, which can be learned) of the target at some positions."""
    assert isinstance(batch.target_rows, PartialTargetRows)
    positions_n = torch.arange(first, min(first + PIECE, batch.tokens_BT.numel()))
    seen = batch.target_rows.of_tokens(positions_n, ids_R)
    return seen.logits_NR.float().softmax(dim=-1), places_V[seen.likeliest_N] >= 0


def logit_gradient(
    kind: str, logits_nR: Tensor, labels_n: Tensor, target: tuple[Tensor, Tensor] | None, at_n: Tensor
) -> Tensor:
    """Return the derivative of each row's loss in its logits."""
    q_nR = logits_nR.softmax(dim=-1)
    if target is None:
        known_n = labels_n >= 0
        q_nR[known_n.nonzero()[:, 0], labels_n[known_n]] -= 1
        return q_nR.mul_(known_n[:, None])
    p_nR, learnable_n = (part[at_n] for part in target)
    gradient_nR = q_nR - p_nR
    if kind == "lk_hybrid":
        accepted_n = torch.minimum(p_nR, q_nR).sum(dim=-1, keepdim=True)
        share_n = torch.exp(-3.0 * accepted_n)
        counted_nR = q_nR * (q_nR < p_nR)
        overlap_nR = counted_nR - q_nR * counted_nR.sum(dim=-1, keepdim=True)
        gradient_nR = share_n * gradient_nR - (1 - share_n) * overlap_nR
    return gradient_nR.mul_(learnable_n[:, None])


def largest_difference(start: Any, kind: str, batch: DraftBatch, target: Target) -> float:
    """Return the largest difference of the gradients of `fit` and of the bare loop, relative to the largest gradient."""
    found = []
    for by_hand in (True, False):
        drafter = copy.deepcopy(start).train()
        if by_hand:
            bare_backward(drafter, kind, batch, "fp32")
        else:
            made = batch_loss(drafter, losses.build(losses.entry(kind).settings()), batch, vocab_size=target.num_tokens)
            (made.total / batch.weight_of_step).backward()
        found.append(torch.cat([one.grad.flatten() for one in drafter.parameters() if one.grad is not None]))
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


if __name__ == "__main__":
    main()
