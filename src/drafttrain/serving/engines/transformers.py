"""Hugging Face's own assisted generation, `generate(assistant_model=...)`, in drafttrain's own Python.

The comparison is with the release that the user has installed, which also serves; its loop, cache and acceptance rule are its own,
and the worker is a process that does not import drafttrain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.environments.known import TRANSFORMERS
from drafttrain.serving.engines import Conventions, DecodedPrompt, Job, ServingEngine, Use, engines


@dataclass
class Transformers:
    """Transformers in drafttrain's own Python."""


@engines.register("transformers", Transformers)
class TransformersEngine(ServingEngine):
    """`generate`, one prompt at a time: it refuses batches."""

    environment = TRANSFORMERS
    worker = Path(__file__).with_name("transformers_worker.py")
    formats = ("hf",)
    methods: ClassVar[Mapping[str, str]] = {"causal_lm": "assistant_model"}

    def draft(self, kind: str, wanted: str) -> str:
        """Return `sampled`: at temperature > 0 the assistant draws as the target does."""
        return "sampled"

    def conventions(self, target: Path) -> Conventions:
        """Return its conventions: it drafts from the first token on, never past the end."""
        return Conventions(first_token_alone=False, drafts_past_end=False)

    def request(self, job: Job, use: Use | None) -> dict[str, Any]:
        """Return the request that transformers_worker.py describes."""
        return {
            "target": str(job.target.resolve()),
            "assistant": None if use is None else use.folder,
            "num_draft_tokens": 0 if use is None else use.num_draft_tokens,
            "dtype": job.dtype,
            "prompts": [list(prompt) for prompt in job.prompts],
            "max_tokens": job.new_tokens,
            "warm_up": job.as_served,
            "runs": [{"temperature": t, "seed": 0} for t in job.temperatures],
        }

    def decoded(self, answer: Mapping[str, Any]) -> list[list[DecodedPrompt]]:
        """Return the outputs of every run."""
        return [[DecodedPrompt(**prompt) for prompt in run["prompts"]] for run in answer["runs"]]

    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return nothing: training itself loads the drafter with transformers."""
        return []

    def command(self, target: str, use: Use) -> str:
        """Return Python code that decodes with a constant draft length; by default transformers adapts it."""
        return _code(target, use)


def with_own_tokenizer(target: str, use: Use) -> str:
    """Return Python code that decodes with a drafter that reads another tokenizer: universal assisted decoding."""
    loaded = f"\nassistant_tokenizer = AutoTokenizer.from_pretrained({json.dumps(use.folder)})"
    return _code(target, use, loaded=loaded, passed=", tokenizer=tokenizer, assistant_tokenizer=assistant_tokenizer")


def _code(target: str, use: Use, *, loaded: str = "", passed: str = "") -> str:
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(target)}){loaded}
target = AutoModelForCausalLM.from_pretrained({json.dumps(target)})
assistant = AutoModelForCausalLM.from_pretrained({json.dumps(use.folder)})
assistant.generation_config.num_assistant_tokens = {use.num_draft_tokens}
assistant.generation_config.num_assistant_tokens_schedule = "constant"
assistant.generation_config.assistant_confidence_threshold = 0.0
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = target.generate(**inputs, assistant_model=assistant{passed}, do_sample=False, max_new_tokens=128)
print(tokenizer.decode(output[0]))"""
