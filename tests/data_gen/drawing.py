"""Data of which a random drafter writes a part."""

import json
from pathlib import Path
from typing import Any

from drafttrain.data_gen.on_policy import OnPolicyData
from drafttrain.data_gen.settings import DataSettings, OnPolicySettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.training_data import TrainingData, prepare
from drafttrain.target_model import Target
from tests.conftest import random_llama

LENGTH = 24


def two_sources(folder: Path, tokenizer: Any) -> TrainingData:
    """Return questions with answers, and plain text, three to one."""
    asked = [{"prompt": f"question {n}" + "?" * (n % 4), "completion": f" {n * n}"} for n in range(7)]
    plain = [{"text": f"text {n} of some length"} for n in range(5)]
    for name, rows in (("asked", asked), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [JSONLSettings(path=str(folder / f"{name}.jsonl"), weight=w) for name, w in (("asked", 3), ("plain", 1))]
    for source in sources:
        object.__setattr__(source, "kind", "jsonl")
    settings = DataSettings(sources=sources, max_length=LENGTH)
    return prepare(settings, folder / "data", tokenizer=tokenizer, tokenizer_fingerprint="", seed=0)


def drawing(
    data: TrainingData, target: Target, *, weights: int = 1, seed: int = 0, drafter: Any = None, **settings: Any
) -> OnPolicyData:
    """Return the data with answers of a drafter, by default a random one."""
    asked = OnPolicySettings(**{"max_new_tokens": 8, "batch_size": 3, **settings})
    model = drafter or random_llama(seed=weights, num_layers=1)
    return OnPolicyData(data, asked, drafter=model, target=target, num_steps=10, seed=seed)
