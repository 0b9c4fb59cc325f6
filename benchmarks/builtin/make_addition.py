"""Writes the tokenizer (words separated by spaces) and the prompts (held-out problems) of the addition task.

`addition` is for choosing settings, `addition_test` for reported figures. No problem is in both. The other held-out problems are
in no file and have never been decoded.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drafttrain.data_gen.sources.addition import VOCABULARY, Addition, AdditionSettings

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "drafttrain"
END, UNKNOWN = "<|end|>", "<|unknown|>"
NUM_VALIDATION, NUM_TEST = 200, 500


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the task's words."""
    vocabulary = {word: number for number, word in enumerate((END, UNKNOWN, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN)
    fast.save_pretrained(folder)


def held_out_problems(*, num_records: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return held-out problems with their answers, each once, by their text."""
    source = Addition(AdditionSettings(num_records=num_records, num_digits=2, split="held_out", seed=seed))
    values = {item.value["prompt"]: item.value for item in source.items()}
    return {text: {key: value[key] for key in ("id", "prompt", "answer", "chat")} for text, value in values.items()}


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(PACKAGE / "builtin" / "addition")
    prompts = PACKAGE / "eval" / "prompts_data"
    validation = list(held_out_problems(num_records=2 * NUM_VALIDATION, seed=1).values())[:NUM_VALIDATION]
    write_lines(prompts / "addition.jsonl", validation)
    used = {value["prompt"] for value in validation}
    fresh = [value for text, value in held_out_problems(num_records=20_000, seed=2).items() if text not in used]
    write_lines(prompts / "addition_test.jsonl", fresh[:NUM_TEST])
