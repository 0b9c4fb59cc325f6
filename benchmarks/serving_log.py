"""Writes the serving log that comes with drafttrain: traffic of the embedded target, whose kind changes in the middle.

    python benchmarks/serving_log.py src/drafttrain/builtin/serving_log/log.jsonl

The first prompts ask for continuations of assertions from the standard library's tests, the later ones for continuations of tables from
its encodings. Target and drafter were trained on neither. Each kind is narrow, so a drafter can learn something from it that the other
does not teach.
"""

import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target, TargetSettings

NUM_REQUESTS = 240
"""Requests of each kind."""
NUM_USERS = 20
PROMPT_TOKENS = 32
NEW_TOKENS = 48
KINDS = {"assertions": ("test", "test_*.py", "self.assert"), "tables": ("encodings", "*.py", " -> ")}
"""Folder in the standard library, its files, and a string that the first line of a prompt contains."""


def prompts(target: Target, kind: str) -> Iterator[Task]:
    """Yield prompts of a kind, all different: the first tokens from a line on, taken from the files in turn."""
    folder, pattern, mark = KINDS[kind]
    draws = random.Random(kind)
    places = []
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / folder).glob(pattern)):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if mark in line]
        places.append((file.name, lines, draws.sample(found, len(found))))
    draws.shuffle(places)
    seen = set()
    while any(found for *_, found in places):
        for name, lines, found in places:
            if found:
                line = found.pop()
                ids = tuple(target.tokenizer("".join(lines[line : line + PROMPT_TOKENS])).input_ids[:PROMPT_TOKENS])
                if len(ids) == PROMPT_TOKENS and ids not in seen:
                    seen.add(ids)
                    yield Task(f"{kind}/{name}:{line + 1}", list(ids), Sampling())


def exchange(target: Target, task: Task, answer: list[int], *, number: int) -> dict[str, object]:
    """Return an OpenAI completion with its token ids, as a gateway logs it."""
    choice = {
        "index": 0,
        "text": target.tokenizer.decode(answer, skip_special_tokens=True),
        "token_ids": answer,
        "prompt_token_ids": list(task.prompt),
        "finish_reason": "stop" if answer[-1] in target.eos_token_ids else "length",
    }
    asked = target.tokenizer.decode(task.prompt, skip_special_tokens=True)
    return {
        "id": f"cmpl-{number}",
        "domain": task.id.partition("/")[0],
        "request": {"model": "target", "user": f"user{number % NUM_USERS}", "prompt": asked},
        "response": {"model": "target", "choices": [choice]},
    }


def main(path: Path) -> None:
    """Write a line for each request."""
    target = Target.load(TargetSettings(model="builtin:target"))
    tasks = [task for kind in KINDS for task, _ in zip(prompts(target, kind), range(NUM_REQUESTS), strict=False)]
    answers = []
    for start in range(0, len(tasks), 16):
        answers += continuations(tasks[start : start + 16], target, max_new_tokens=NEW_TOKENS, seed=0)
    lines = [
        exchange(target, task, list(map(int, answer)), number=number)
        for number, (task, answer) in enumerate(zip(tasks, answers, strict=True))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
