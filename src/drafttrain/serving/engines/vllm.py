"""vLLM on a CPU: drafts chains, at temperature > 0 greedily by default. Tried with 0.32.0."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.foreign import read_json
from drafttrain.drafters.eagle.eagle1 import FC_BIAS
from drafttrain.environments.known import VLLM_CPU, VLLM_RELEASE
from drafttrain.export.checkpoint import CheckpointExporter
from drafttrain.export.layout import text_config
from drafttrain.export.vllm import VllmExporter
from drafttrain.serving.engines import CounterNames, DecodedPrompt, Job, ServingEngine, Use, engines

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes that its CPU attention has kernels for."""

MISLEADING_WORDS = {"eagle-": "EAGLE", "eagle3": "EAGLE-3", "dflash": "DFlash", "dspark": "DSpark"}
"""Words in the path of a drafter that make vLLM load it as another kind, whatever the method, except for EAGLE itself."""


@dataclass
class Vllm:
    """vLLM in its own environment."""


@engines.register("vllm", Vllm)
class VllmEngine(ServingEngine):
    """`vllm-cpu`, with a process for each configuration."""

    environment = VLLM_CPU
    worker = Path(__file__).with_name("vllm_worker.py")
    formats = ("vllm", "hf", "speculators", "checkpoint")
    methods: ClassVar[Mapping[str, str]] = {**VllmExporter.reads, **CheckpointExporter.reads}
    counters: ClassVar[CounterNames | None] = CounterNames(
        num_drafts="vllm:spec_decode_num_drafts_total",
        num_draft_tokens="vllm:spec_decode_num_draft_tokens_total",
        num_accepted="vllm:spec_decode_num_accepted_tokens_total",
        accepted_at="vllm:spec_decode_num_accepted_tokens_per_pos_total",
        num_requests="vllm:request_success_total",
        num_tokens="vllm:generation_tokens_total",
    )

    def draft(self, kind: str, wanted: str) -> str:
        """Return `greedy` for kinds whose draft tokens do not depend on each other; other kinds draft both ways."""
        return "greedy" if kind in ("medusa", "p_eagle") else wanted

    def request(self, job: Job, use: Use | None) -> dict[str, Any]:
        """Return the request that vllm_worker.py describes."""
        return {
            "target": str(job.target.resolve()),
            "speculative_config": None if use is None else self._speculative(use),
            "dtype": job.dtype,
            "max_model_len": job.max_length,
            "prompts": [list(prompt) for prompt in job.prompts],
            "max_tokens": job.new_tokens,
            "warm_up": job.as_served,
            "runs": [{"temperature": t, "seed": 0} for t in job.temperatures],
        }

    def decoded(self, answer: Mapping[str, Any]) -> list[list[DecodedPrompt]]:
        """Return the outputs of every run."""
        return [[DecodedPrompt(**prompt) for prompt in run["prompts"]] for run in answer["runs"]]

    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return why vLLM cannot run this drafter on a CPU."""
        found = self.misread(drafter, kind)
        own = read_json(drafter / "config.json")
        for what, config in (("the target", text_config(target_config)), (str(drafter), own)):
            size = _head_size(config)
            if size is not None and size not in HEAD_SIZES:
                sizes = ", ".join(map(str, HEAD_SIZES))
                found.append(f"{what}: attention heads of size {size}: vLLM's CPU attention supports only {sizes}")
        return found

    def misread(self, drafter: Path, kind: str) -> list[str]:
        """Return words in the path that mislead vLLM, and weights that it drops."""
        path = str(drafter.resolve()).lower()
        dropped = []
        if kind == "eagle" and read_json(drafter / "config.json").get(FC_BIAS):
            dropped = [
                f"{drafter}: fc has a bias: vLLM {VLLM_RELEASE} silently drops it and drafts worse; SGLang uses it"
            ]
        return dropped + [
            f"{drafter}: vLLM takes a drafter with {word!r} in its path for {other}: rename the folder"
            for word, other in MISLEADING_WORDS.items()
            if word in path and self.methods[kind] not in ("eagle", "eagle3", "dflash")
        ]

    def command(self, target: str, use: Use) -> str:
        """Return `vllm serve ...`."""
        speculative = shlex.quote(json.dumps(self._speculative(use)))
        if use.kind in CheckpointExporter.reads:
            # The folder is the target's checkpoint, and holds the layer.
            target = use.folder
        return f"vllm serve {shlex.quote(target)} --speculative-config {speculative}"

    def _speculative(self, use: Use) -> dict[str, Any]:
        sampled = {"draft_sample_method": "probabilistic"} if use.draft == "sampled" else {}
        return {
            "method": self.methods[use.kind],
            "model": use.folder,
            "num_speculative_tokens": use.num_draft_tokens,
            **sampled,
            **({"parallel_drafting": True} if use.kind == "p_eagle" else {}),
        }


def _head_size(config: Mapping[str, Any]) -> int | None:
    config = config.get("transformer_layer_config", config)
    heads = config.get("num_attention_heads")
    return int(config.get("head_dim") or config["hidden_size"] // heads) if heads else None
