"""Cuts the built-in prompt sets out of the held-out modules: the first 48 tokens of passages that begin at a line."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from drafttrain.core.random import stream
from drafttrain.data_gen.stdlib_text import documents

TOKENS = 48
SETS = {"validation": 64, "test": 128}


def main(tokenizer_folder: Path, folder: Path) -> None:
    """Write one JSONL file per set; a module serves only one set."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    modules = sorted({name.split("/")[0] for name, _ in documents("held_out")} - {"topic"})
    for_validation = set(modules[::3])
    for set_name, count in SETS.items():
        chosen = []
        for name, text in documents("held_out"):
            top = name.split("/")[0]
            ours = top in for_validation if top != "topic" else len(name) % 3 == 0
            if ours == (set_name == "validation"):
                chosen += list(passages(name, text, tokenizer))
        order = torch.randperm(len(chosen), generator=stream(0, "builtin prompts", set_name)).tolist()
        rows = [chosen[i] for i in order[:count]]
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{set_name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(set_name, len(rows), "of", len(chosen), "passages")


def passages(name, text, tokenizer):
    """Yield a prompt from each stretch of some 2,000 characters, beginning at a line that is not blank."""
    lines = text.splitlines(keepends=True)
    position, last = 0, -2000
    for index, line in enumerate(lines):
        if position - last >= 2000 and line.strip():
            ids = tokenizer("".join(lines[index : index + 40])).input_ids[:TOKENS]
            if len(ids) == TOKENS:
                domain = "documentation" if name.startswith("topic/") else "source"
                yield {"id": f"{name}:{index + 1}", "domain": domain, "text": tokenizer.decode(ids)}
                last = position
        position += len(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
