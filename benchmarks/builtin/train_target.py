"""Trains the embedded target, first phase: next-token cross-entropy on the train side of the standard library's text.

A step has 16 rows of 256 tokens. The optimizer is Muon on matrices and AdamW on the rest. The learning rate warms up, stays constant,
and decays linearly over the last 35 % of the time given. The second phase is `unlikelihood.py`. `check_target.py` prints the figures.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.core.random import stream
from drafttrain.data_gen.stdlib_text import documents
from drafttrain.target_model.tokenizer import load_tokenizer
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.settings import TrainSettings

LENGTH, ROWS, DECAY = 256, 16, 0.35


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="autocast: faster where the processor has bf16, far slower elsewhere"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ids: list[int] = []
    for _, text in documents("train"):
        ids += [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    settings = TrainSettings(optimizer="muon", lr=arguments.lr, weight_decay=0.05)
    optimizer = build_optimizer(model, settings)
    tokens = torch.tensor(ids)
    began, step, order, rows = time.time(), 0, torch.empty(0, dtype=torch.long), tokens
    print(f"{model.num_parameters()} parameters, {len(ids)} tokens", flush=True)
    while (spent := (time.time() - began) / arguments.seconds) < 1:
        if len(order) < ROWS:
            # Every epoch cuts the rows at other places, so that no two epochs are equal.
            generator = stream(0, "target", step)
            offset = int(torch.randint(LENGTH, (1,), generator=generator))
            rows = tokens[offset : offset + (len(tokens) - offset) // LENGTH * LENGTH].view(-1, LENGTH)
            order = torch.randperm(len(rows), generator=generator)
        picked, order = rows[order[:ROWS]], order[ROWS:]
        scale = min(1.0, (step + 1) / 100, (1 - spent) / DECAY)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            logits = model(input_ids=picked, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), picked[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            seen = step * ROWS * LENGTH
            print(f"step {step} loss {float(loss.detach()):.3f} {seen} tokens {time.time() - began:.0f} s", flush=True)
        if step % 500 == 0:
            model.save_pretrained(arguments.out)
    model.save_pretrained(arguments.out)
    print(f"done: {step} steps, {step * ROWS * LENGTH} tokens, {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
