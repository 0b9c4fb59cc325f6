"""Compares losses on a large vocabulary with full logits: CPU seconds, memory and gradients of one micro-batch.

    python benchmarks/loss_scale.py
    python benchmarks/loss_scale.py --losses jsd --rows 1024 --trained

Sides that take turns, one process each: `fused` (what a training step runs), `eager` (the logits of both models at once, the formula
in plain PyTorch), `speculators` (its losses, which also read full logits) and `liger` (its chunked Jensen-Shannon divergence).
The last two only if the packages are installed (`pip install --no-deps speculators liger-kernel`).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftOutput
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.step import drafted_loss
from drafttrain.losses.tvdpp import TVDPPSettings
from drafttrain.target_model.logits import LiveRows

V = 151_936
SIDES = ("fused", "eager", "speculators", "liger")
SPECULATORS = {
    "forward_kl": "kl_div_loss",
    "reverse_kl": "reverse_kl_div_loss",
    "jsd": "js_div_loss",
    "tvd": "tv_loss",
    "neg_log_acceptance": "neg_log_acceptance_loss",
    "lk_hybrid": "lk_hybrid_loss",
}


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) of each row."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum min(p, q) of each row."""
    return torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row."""
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    return 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


def tvdpp(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return TVD++ of each row, rewards normalised over the row."""
    q, reward = log_q.detach().exp(), (log_p > log_q.detach()).float()
    mean = (q * reward).sum(-1, keepdim=True)
    advantage = (reward - mean) / ((mean * (1 - mean)).sqrt() + 1e-6)
    return -(q * advantage * log_q).sum(-1)


def lk_hybrid(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL that turns into TVD, of each row."""
    rate = acceptance(log_p, log_q)
    share = (-3 * rate.detach()).exp()
    return share * kl(log_p, log_q) + (1 - share) * (1 - rate)


EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "tvd": lambda log_p, log_q: 1 - acceptance(log_p, log_q),
    "tvdpp": tvdpp,
    "neg_log_acceptance": lambda log_p, log_q: -acceptance(log_p, log_q).log(),
    "lk_hybrid": lk_hybrid,
}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="*", default=list(EAGER), choices=EAGER)
    parser.add_argument("--rows", nargs="*", type=int, default=[512])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--trained", action="store_true", help="the drafter's head is its own and trained")
    parser.add_argument("--pairs", type=int, default=4, help="turns of each side after the first, which warms up")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "LOSS", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, loss, rows = arguments.worker
        worker(side, loss, int(rows), width=arguments.width, trained=arguments.trained)
        return
    head = "its own trained head" if arguments.trained else "the target's frozen head"
    print(f"V = {V:,}, D = {arguments.width}, {head}, float32, one thread, {processor()}, commit {commit()}\n")
    print("| loss | rows | side | CPU seconds | side / fused [95 %] | memory | gradient differs by |")
    print("|---|---|---|---|---|---|---|")
    for loss in arguments.losses:
        for rows in arguments.rows:
            for line in compared(loss, rows, arguments):
                print(line, flush=True)


def compared(loss: str, rows: int, arguments: argparse.Namespace) -> list[str]:
    """Return the rows of the table of one loss."""
    sides = [side for side in arguments.sides if has(side, loss)]
    command = [sys.executable, __file__, "--width", str(arguments.width), *(["--trained"] * arguments.trained)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = {
        side: subprocess.Popen(
            [*command, "--worker", side, loss, str(rows)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for side in sides
    }
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for pair in range(arguments.pairs + 1):
        for side in sides[:: -1 if pair % 2 else 1]:
            turns[side].append(turn(workers[side]))
    for one in workers.values():
        one.communicate()
    lines = []
    ones = [1.0] * arguments.pairs
    times = {side: [one["seconds"] for one in turns[side][1:]] for side in sides}
    own = turns[sides[0]][0]
    for side in sides:
        first = turns[side][0]
        ratio = "" if side == sides[0] else str(ratio_of_ratios((times[side], ones), (times[sides[0]], ones)))
        differs = "" if side == sides[0] else f"{difference(own['gradient'], first['gradient']):.0e}"
        seconds = sum(times[side]) / len(times[side])
        lines.append(f"| {loss} | {rows} | {side} | {seconds:.1f} | {ratio} | {first['peak_mb']:,.0f} MB | {differs} |")
    return lines


def has(side: str, loss: str) -> bool:
    """Return whether a side computes a loss here."""
    if side == "speculators":
        return loss in SPECULATORS and importlib.util.find_spec("speculators") is not None
    return side != "liger" or (loss == "jsd" and importlib.util.find_spec("liger_kernel") is not None)


def turn(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Let a worker take a turn."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    answer: dict[str, Any] = json.loads(worker.stdout.readline())
    return answer


def difference(one: list[float], other: list[float]) -> float:
    """Return the relative distance of two gradients."""
    a, b = torch.tensor(one).double(), torch.tensor(other).double()
    return float((a - b).norm() / a.norm())


def worker(side: str, loss: str, rows: int, *, width: int, trained: bool) -> None:
    """Compute a loss and its gradient for each line that is read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=True, **sizes)).requires_grad_(False)
    head = model.lm_head
    head.weight.normal_(std=2 / width**0.5)
    final_BTD = torch.randn(1, rows + 1, width)
    states_BTD = (final_BTD + 0.5 * torch.randn(1, rows + 1, width)).requires_grad_()
    own = torch.nn.Linear(width, V, bias=False).requires_grad_(trained)
    own.weight.data = head.weight.clone() if trained else head.weight
    tokens = torch.randint(V, (rows + 1,)).tolist()
    batch, _ = pack([Record("", tokens, [False] + [True] * rows)], width=rows + 1, weight_of_step=float(rows))
    batch = replace(batch, target_rows=LiveRows(model, final_BTD))
    compute = {"fused": fused, "eager": eager, "speculators": of_speculators, "liger": of_liger}[side]
    for _ in sys.stdin:
        states_BTD.grad = own.weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.process_time()
        total = compute(loss, states_BTD, own, final_BTD, head, batch)
        total.backward()
        seconds = time.process_time() - start
        grown = memory("VmHWM") - before
        assert states_BTD.grad is not None
        given = states_BTD.grad[0, :-1].mean(1)
        if own.weight.grad is not None:
            given = torch.cat([given, own.weight.grad.mean(1)])
        print(json.dumps({"seconds": seconds, "peak_mb": grown / 1000, "gradient": given.tolist()}), flush=True)


def memory(name: str) -> int:
    """Return a line of this process's status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def fused(loss: str, states_BTD: Tensor, own: torch.nn.Linear, _f: Tensor, _h: torch.nn.Linear, batch: Any) -> Tensor:
    """Return the sum over rows as a training step computes it."""
    settings = TVDPPSettings(scope="position") if loss == "tvdpp" else losses.entry(loss).settings()
    drafted = DraftOutput({1: states_BTD}, LinearHead(lambda _: own), lag=0)
    rows = align(drafted, batch)
    return drafted_loss(losses.build(settings), drafted, rows, batch, vocab_size=V, measured=False).total


def eager(
    loss: str, states_BTD: Tensor, own: torch.nn.Linear, final_BTD: Tensor, head: torch.nn.Linear, _b: Any
) -> Tensor:
    """Return the sum over rows from the logits of both models."""
    log_p = head(final_BTD[0, :-1]).log_softmax(-1)
    return EAGER[loss](log_p, own(states_BTD[0, :-1]).log_softmax(-1)).sum()


def of_speculators(
    loss: str, states_BTD: Tensor, own: torch.nn.Linear, final_BTD: Tensor, head: torch.nn.Linear, _b: Any
) -> Tensor:
    """Return the sum over rows by speculators' loss. Its file is loaded alone: the package imports much that a loss does not need."""
    found = importlib.util.find_spec("speculators")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "losses/eager.py"
    spec = importlib.util.spec_from_file_location("speculators_eager", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value: Tensor = getattr(module, SPECULATORS[loss])(own(states_BTD[:, :-1]), head(final_BTD[:, :-1])).sum()
    return value


def of_liger(
    _l: str, states_BTD: Tensor, own: torch.nn.Linear, final_BTD: Tensor, head: torch.nn.Linear, _b: Any
) -> Tensor:
    """Return the sum over rows by Liger's chunked loss, not compiled; it returns the mean, and always the matrix's gradient."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    states_ND, labels_N = states_BTD[0, :-1], torch.zeros(states_BTD.shape[1] - 1, dtype=torch.long)
    # weights of the hard and the soft loss, beta, the ignored label, temperature, compiled, rows of a chunk
    options = (0.0, 1.0, 0.5, -100, 1.0, False, 64)
    made = LigerFusedLinearJSDFunction.apply(
        states_ND, own.weight, final_BTD[0, :-1], head.weight, labels_N, None, None, *options
    )
    value: Tensor = made[0] if isinstance(made, tuple) else made
    return value * len(labels_N)


if __name__ == "__main__":
    main()
