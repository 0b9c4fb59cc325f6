"""Stands in for the package vllm: writes a fixed continuation of each prompt, and dies on demand. Imports no drafttrain."""

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__version__ = "0"


@dataclass
class SamplingParams:
    """Stands in for SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    max_tokens: int
    stop_token_ids: list[int]
    detokenize: bool


class LLM:
    """Writes tokens that depend on the prompt alone."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.num_shards = 0

    def generate(self, prompts: list[Any], sampling: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        """Return the texts of a shard."""
        if str(self.num_shards) == os.environ.get("STUB_VLLM_DIES_AFTER"):
            os._exit(3)
        self.num_shards += 1
        with open(os.environ["STUB_VLLM_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{len(prompts)}\n")
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=_text(p["prompt_token_ids"], s), finish_reason="length")]
            )
            for p, s in zip(prompts, sampling, strict=True)
        ]


def _text(prompt: list[int], sampling: SamplingParams) -> list[int]:
    return [(sum(prompt) + i) % 200 + 5 for i in range(sampling.max_tokens)]
