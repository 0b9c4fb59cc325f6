"""OpenVINO GenAI on a CPU: drafts chains, greedily. Tried with 2026.4.1.0 and optimum-intel 2.2.0.

It does not run at temperature > 0: with a drafter it does not sample from the target's distribution (docs/serving.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.console import say
from drafttrain.core.files import folder_beside, sha256_of
from drafttrain.core.foreign import read_json
from drafttrain.environments.environment import root
from drafttrain.environments.known import OPENVINO
from drafttrain.export.openvino import OpenVinoExporter, taps_problems
from drafttrain.export.openvino_graph import GRAPH, write_graph
from drafttrain.serving.engines import Conventions, DecodedPrompt, Job, ServingEngine, Use, engines
from drafttrain.target_model.folders import fingerprint_of


@dataclass
class OpenVino:
    """OpenVINO GenAI in its own environment."""


@engines.register("openvino", OpenVino)
class OpenVinoEngine(ServingEngine):
    """`LLMPipeline` with a draft model."""

    environment = OPENVINO
    worker = Path(__file__).with_name("openvino_worker.py")
    formats = ("openvino",)
    methods: ClassVar[Mapping[str, str]] = OpenVinoExporter.reads
    samples = False

    def draft(self, kind: str, wanted: str) -> str:
        """Return `greedy`: it runs at temperature 0 only."""
        return "greedy"

    def conventions(self, target: Path) -> Conventions:
        """Return its conventions: it never drafts past the end."""
        return Conventions(drafts_past_end=False)

    def target_as(self, folder: Path, dtype: str | None = None) -> Path:
        """Return the target in OpenVINO's format beside the environments; each version of weights and tokenizer is converted once.

        Raises:
            EngineError: The target cannot be converted.
        """
        parts = [fingerprint_of(folder), sha256_of(folder / "tokenizer.json"), *self.environment.pins]
        converted = root() / "openvino-targets" / hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
        if not (converted / GRAPH).exists():
            say(f"openvino: converting the target to {converted}")
            with folder_beside(converted) as temporary:
                write_graph(folder, temporary)
        return converted

    def request(self, job: Job, use: Use | None) -> dict[str, Any]:
        """Return the request that openvino_worker.py describes."""
        return {
            "target": str(self.target_as(job.target, job.dtype)),
            "drafter": None if use is None else use.folder,
            "num_draft_tokens": 0 if use is None else use.num_draft_tokens,
            "dtype": job.dtype,
            "prompts": [list(prompt) for prompt in job.prompts],
            "max_tokens": job.new_tokens,
            "warm_up": job.as_served,
        }

    def decoded(self, answer: Mapping[str, Any]) -> list[list[DecodedPrompt]]:
        """Return the outputs of the greedy run."""
        return [[DecodedPrompt(**prompt) for prompt in answer["prompts"]]]

    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return why OpenVINO cannot provide the states of an EAGLE-3 drafter's target."""
        config = read_json(drafter / "config.json")
        return taps_problems(config, target_config) if kind == "eagle3" else []

    def command(self, target: str, use: Use) -> str:
        """Return Python code that decodes."""
        return f"""\
import openvino_genai

drafter = openvino_genai.draft_model({json.dumps(use.folder)}, "CPU")
pipeline = openvino_genai.LLMPipeline({json.dumps(target)}, "CPU", draft_model=drafter)
config = openvino_genai.GenerationConfig()
config.max_new_tokens = 128
config.do_sample = False
config.num_assistant_tokens = {use.num_draft_tokens}
print(pipeline.generate("Once upon a time", config))"""
