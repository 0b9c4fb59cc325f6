"""Measures the embedded target: held-out cross-entropy, and the length of greedy outputs before they repeat themselves."""

import argparse
import json
from importlib import resources

import torch

from drafttrain.data_gen.stdlib_text import documents
from drafttrain.eval.repetition import tokens_before_repetition
from drafttrain.target_model import Target, TargetSettings


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--tokenizer", default=None)
    parser.add_argument("--show", type=int, default=0, help="number of outputs to print")
    arguments = parser.parse_args()
    target = Target.load(TargetSettings(model=arguments.target, tokenizer=arguments.tokenizer))
    tokenizer = target.tokenizer
    path = resources.files("drafttrain") / "eval" / "prompts_data" / "test.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()][:64]
    prompts = torch.tensor([tokenizer(text).input_ids[:48] for text in texts if len(tokenizer(text).input_ids) >= 48])
    outputs = target.model.generate(prompts, max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    new = outputs[:, prompts.shape[1] :].tolist()
    lengths = [tokens_before_repetition(row) for row in new]
    reached = sum(length >= 64 for length in lengths)
    print(f"held-out cross-entropy {held_out_cross_entropy(target):.4f} nats per token")
    print(
        f"{reached} of {len(lengths)} greedy outputs reach 64 tokens before a 12-gram repeats; lengths {sorted(lengths)}"
    )
    for row, length in list(zip(new, lengths, strict=True))[: arguments.show]:
        print("----", length)
        print(tokenizer.decode(row))


def held_out_cross_entropy(target: Target, *, rows: int = 64, length: int = 256) -> float:
    """Return the cross-entropy in nats per token over the first rows of the held-out side."""
    ids: list[int] = []
    for _, text in documents("held_out"):
        ids += [target.tokenizer.eos_token_id, *target.tokenizer(text).input_ids]
        if len(ids) > rows * length:
            break
    tokens = torch.tensor(ids[: rows * length]).view(rows, length)
    with torch.no_grad():
        logits = target.model(tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


if __name__ == "__main__":
    main()
