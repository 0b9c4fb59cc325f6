"""Trains the embedded target, second phase: sequence-level unlikelihood, so that its greedy text does not loop.

A target that loops flatters every drafter, and a model of 3 M parameters loops. Here the model writes greedy continuations of training
text. The loss lowers the probability of each token that completes a repeated n-gram of its own output. It is mixed with ordinary
cross-entropy on the text, so that nothing else is forgotten. Only train-side text is used.

Source: Welleck et al. 2019, Neural Text Generation with Unlikelihood Training, arXiv 1908.04319, 5.2.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from drafttrain.core.random import stream
from drafttrain.data_gen.stdlib_text import documents
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.tokenizer import load_tokenizer
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.settings import TrainSettings

PROMPT, NEW, ROWS, LENGTH = 48, 128, 32, 256


def repeats(tokens: list[int], ngram: int) -> list[bool]:
    """Mark the tokens that complete an n-gram seen earlier in the same output."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(tokens) + 1):
        window = tuple(tokens[max(0, end - ngram) : end])
        marks.append(end >= ngram and window in seen)
        if end >= ngram:
            seen.add(window)
    return marks


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ngram", type=int, default=8)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="autocast: faster where the processor has bf16, far slower elsewhere"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_causal_lm(arguments.start).requires_grad_(True)
    tokenizer = load_tokenizer(arguments.tokenizer)
    ids: list[int] = []
    for _, text in documents("train"):
        ids += [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    settings = TrainSettings(optimizer="adamw", lr=arguments.lr, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    began = time.time()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1.0, (step + 1) / 10, (arguments.steps - step) / (0.5 * arguments.steps))
        picked = rows[torch.randperm(len(rows), generator=stream(0, "unlikelihood", step))[: 2 * ROWS]]
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            model.eval()
            written = model.generate(
                picked[:ROWS, :PROMPT], max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            marks = torch.tensor(
                [[False] * PROMPT + repeats(row[PROMPT:].tolist(), arguments.ngram) for row in written]
            )
            logits = model(input_ids=written, use_cache=False).logits[:, :-1].float()
            chance = torch.softmax(logits, -1).gather(-1, written[:, 1:, None])[..., 0]
            unlikely = -torch.log1p(-chance.clamp(max=1 - 1e-4))
            marked = marks[:, 1:]
            loss_repeat = (unlikely * marked).sum() / max(1, int(marked.sum()))
            text = picked[ROWS:]
            logits = model(input_ids=text, use_cache=False).logits[:, :-1].float()
            loss_text = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        (loss_text + arguments.weight * loss_repeat).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(
                f"step {step} text {float(loss_text):.3f} repeat {float(loss_repeat):.3f} "
                f"repeated share {float(marked.float().mean()):.3f} {time.time() - began:.0f} s",
                flush=True,
            )
    model.bfloat16().save_pretrained(arguments.out)
    settings_used = {k: str(v) for k, v in vars(arguments).items() if k not in ("start", "tokenizer", "out")}
    (arguments.out / "unlikelihood.json").write_text(json.dumps(settings_used) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
