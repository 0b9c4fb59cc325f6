"""The frontier of reduced prompts on the embedded pair: source files that its target was not trained on, and additions. LOSSY.

    python benchmarks/long_prompt.py OUT [--num-prompts 16] [--prompt-tokens 256] [--max-new-tokens 32]

Writes OUT/prompts.jsonl, then runs `drafttrain long-prompt` on it, and on `builtin:addition_test` with its checker.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch

from drafttrain.commands.long_prompt import measure_long_prompts
from drafttrain.core.provenance import commit
from drafttrain.eval.long_prompt.kept import Amount
from drafttrain.eval.prompts import prompt_file
from drafttrain.target_model import Target, TargetSettings

KEYS = "{kind: speckv, window_tokens: 8}, {kind: speckv, window_tokens: 8, look_ahead_tokens: 0}"
PLAIN_KEYS = "{kind: random, window_tokens: 8}, {kind: last_window}"
PC = "kind: specpc, window_tokens: 32, pool_tokens: 4, neighbours: 4"
TOKENS = f"{{{PC}}}, {{{PC}, positions: kept}}"
PLAIN_TOKENS = "{kind: random, of: tokens, positions: kept}, {kind: last_window, of: tokens, positions: kept}"


def main() -> None:
    """Write the prompts, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = arguments.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in held_out(arguments)), encoding="utf-8")
    new = f"eval.max_new_tokens={arguments.max_new_tokens}"
    measure_long_prompts(
        "builtin:drafter",
        "builtin:target",
        [new, f"long_prompt.choices=[{KEYS}, {PLAIN_KEYS}, {TOKENS}, {PLAIN_TOKENS}]"],
        amounts=[Amount(share=share) for share in (0.125, 0.25, 0.5, 0.75, 1.0)],
        prompts=str(prompts),
        out=arguments.out,
    )
    measure_long_prompts(
        "builtin:adder_drafter",
        "builtin:adder",
        [
            "eval.max_new_tokens=64",
            "eval.num_prompts=16",
            "eval.checker={kind: numeric, spaced_digits: true}",
            "long_prompt.choices=[{kind: speckv, window_tokens: 1, pool_tokens: 1}, {kind: random, window_tokens: 1}, "
            "{kind: last_window, first_tokens: 1}]",
        ],
        amounts=[Amount(tokens=tokens) for tokens in (3, 4, 5, 6)],
        prompts="builtin:addition_test",
        out=arguments.out / "addition",
    )
    print(f"\ncommit {commit()}")


def held_out(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Return texts from the middle of source files whose pieces are the test prompts: the target was trained on none of them."""
    tokenizer = Target.load(TargetSettings(model="builtin:target")).tokenizer
    names = [json.loads(line)["id"].split(":")[0] for line in prompt_file("builtin:test").read_text().splitlines()]
    found = []
    for name in dict.fromkeys(names):
        path = Path(sysconfig.get_path("stdlib")) / name
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[len(lines) // 2 :])
        tokens = tokenizer(text)["input_ids"][: arguments.prompt_tokens]
        if len(tokens) == arguments.prompt_tokens:
            found.append({"id": name, "text": tokenizer.decode(tokens)})
    return found[: arguments.num_prompts]


if __name__ == "__main__":
    main()
