"""Answers of an evaluation as the files that Spec-Bench's `speed.py` reads.

Source: Xia et al. 2024, Unlocking Efficiency in Large Language Model Inference: A Comprehensive Survey of Speculative
    Decoding, arXiv 2401.07851; https://github.com/hemingkx/Spec-Bench for the files.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.files import write_text
from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.eval.arms import Arm


def write_answers(folder: Path, arms: Sequence[Arm]) -> None:
    """Write the answers of every arm to `NAME-temperature-T.jsonl`: a line for each question with all its turns."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        name = re.sub(r"[^\w.-]+", "-", arm.name).strip("-")
        path = folder / f"{name}-temperature-{arm.engine.sampling.temperature:g}.jsonl"
        write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in _answers(arm)))


def _answers(arm: Arm) -> Iterator[Mapping[str, Any]]:
    turns: dict[str, list[tuple[Prompt, Generation]]] = {}
    for prompt, generation in zip(arm.prompts, arm.generations, strict=True):
        turns.setdefault(prompt.unit, []).append((prompt, generation))
    for unit, of_question in turns.items():
        outputs = [generation for _, generation in of_question]
        yield {
            "question_id": int(unit) if unit.isdecimal() else unit,
            "category": of_question[0][0].domain,
            "answer_id": f"{arm.name}:{unit}",
            "model_id": arm.name,
            "choices": [
                {
                    "index": 0,
                    "turns": [arm.target.tokenizer.decode(list(o.tokens), skip_special_tokens=True) for o in outputs],
                    "decoding_steps": [len(one.rounds) for one in outputs],
                    "new_tokens": [len(one.tokens) for one in outputs],
                    "wall_time": [one.seconds for one in outputs],
                    "accept_lengths": [part.num_emitted for one in outputs for part in one.rounds],
                }
            ],
            "tstamp": time.time(),
        }
