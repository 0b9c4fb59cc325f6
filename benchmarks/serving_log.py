"""Writes the serving log that comes with drafttrain: what the embedded target answers to pieces of the standard library.

python benchmarks/serving_log.py src/drafttrain/builtin/serving_log/log.jsonl
"""

import json
import sys
from pathlib import Path

from drafttrain.core.records import Sampling
from drafttrain.data_gen.generate import Task, continuations
from drafttrain.data_gen.stdlib_text import documents
from drafttrain.target import Target, TargetSettings

NUM_REQUESTS = 240
PROMPT_TOKENS = 32
NEW_TOKENS = 48


def main(path: Path) -> None:
    """Write one OpenAI completion with its token ids a line."""
    target = Target.load(TargetSettings(model="builtin:target"))
    found = []
    for name, text in documents("train"):
        ids = target.tokenizer(text[4000:6000]).input_ids[:PROMPT_TOKENS]
        if len(ids) == PROMPT_TOKENS:
            found.append((name, ids))
    step = max(1, len(found) // NUM_REQUESTS)
    chosen = found[::step][:NUM_REQUESTS]
    tasks = [Task(name, ids, Sampling()) for name, ids in chosen]
    answers = []
    for start in range(0, len(tasks), 16):
        answers += continuations(tasks[start : start + 16], target, max_new_tokens=NEW_TOKENS, seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number, (task, new) in enumerate(zip(tasks, answers, strict=True)):
            ids = list(map(int, new))
            choice = {
                "index": 0,
                "text": target.tokenizer.decode(ids, skip_special_tokens=True),
                "token_ids": ids,
                "prompt_token_ids": list(task.prompt),
                "finish_reason": "stop" if ids[-1] in target.eos_token_ids else "length",
            }
            line = {
                "id": f"cmpl-{number}",
                "domain": "source" if task.id.endswith(".py") else "documentation",
                "request": {
                    "model": "target",
                    "user": f"user{number % 20}",
                    "prompt": target.tokenizer.decode(task.prompt, skip_special_tokens=True),
                },
                "response": {"model": "target", "choices": [choice]},
            }
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
