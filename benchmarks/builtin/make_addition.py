"""Writes what the addition task needs: its tokenizer (words apart by spaces) and its evaluation prompts, held-out problems."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drafttrain.data_gen.sources.addition import VOCABULARY, Addition, AdditionSettings

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "drafttrain"
END, UNKNOWN = "<|end|>", "<|unknown|>"
NUM_PROMPTS = 200


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the task's words."""
    vocabulary = {word: number for number, word in enumerate((END, UNKNOWN, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN)
    fast.save_pretrained(folder)


def write_prompts(path: Path) -> None:
    """Write problems of the held-out side, each once, with their answers."""
    source = Addition(AdditionSettings(num_records=2 * NUM_PROMPTS, num_digits=2, split="held_out", seed=1))
    values = {item.value["prompt"]: item.value for item in source.items()}
    kept = [{key: value[key] for key in ("id", "prompt", "answer", "chat")} for value in values.values()]
    path.write_text("".join(json.dumps(value) + "\n" for value in kept[:NUM_PROMPTS]), encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(PACKAGE / "builtin" / "addition")
    write_prompts(PACKAGE / "eval" / "prompts_data" / "addition.jsonl")
