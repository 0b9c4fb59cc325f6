"""Texts by vLLM in its own environment: token ids in, token ids out, without a server.

`drafttrain engines install vllm` creates the environment for CPUs, `vllm-cuda` the one for GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from drafttrain.core.console import Progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.random import stream_seed
from drafttrain.core.settings import setting
from drafttrain.data_gen.backends import NOT_REPRODUCIBLE, Outcome, Plan, Task, backends, unusable
from drafttrain.environments.environment import Environment, ask
from drafttrain.environments.known import VLLM_CPU, VLLM_CUDA
from drafttrain.target_model.folders import fingerprint_of, resolve_folder

WORKER = Path(__file__).with_name("vllm_worker.py")
LARGEST_SEED = 2**31


@dataclass
class VllmSettings:
    """vLLM generates the texts, shard by shard, in its own process."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, help="Type of the weights in the engine; null: the target's."
    )
    memory_gb: float = setting(1.0, help="Size of the engine's KV cache; on a CPU rounded up to whole gigabytes.", gt=0)
    tensor_parallel_size: int = setting(1, help="GPUs that share the target's weights.", ge=1)

    def smoke(self) -> VllmSettings:
        """Return a copy that needs little memory."""
        return replace(self, memory_gb=min(self.memory_gb, 1.0))


def environment_on(device: str) -> Environment:
    """Return the environment for a kind of device."""
    return VLLM_CUDA if device == "cuda" else VLLM_CPU


@backends.register("vllm", VllmSettings)
class Vllm:
    """Runs one process for all missing shards; shards that it finished before it died are loaded."""

    def __init__(self, settings: VllmSettings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan

    def content(self) -> dict[str, Any]:
        """Return the type of the weights, which moves logits."""
        return {"kind": "vllm", "dtype": self._dtype}

    def reproducible(self) -> dict[str, Any]:
        """Return that sampled texts are not reproducible."""
        return NOT_REPRODUCIBLE

    def write(self, shards: Mapping[int, Sequence[Task]], bar: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield the outcomes of each shard.

        Raises:
            DataError: The folder of the target's name holds another model now.
        """
        if not shards:
            return
        answered = {number: self.plan.folder / f"answers-{number:05d}.json" for number in shards}
        missing = [number for number, file in answered.items() if not file.exists()]
        if len(missing) < len(shards):
            say(f"{len(shards) - len(missing)} of {len(shards)} shards were finished before")
        if missing:
            request = self._request({number: shards[number] for number in missing}, answered)
            ask(environment_on(self.plan.target.device.type), WORKER, request, timeout_seconds=None)
        for number, shard in shards.items():
            texts = json.loads(answered[number].read_text(encoding="utf-8"))
            outcomes = [self._outcome(text) for text in texts]
            assert len(outcomes) == len(shard), "the worker answers every prompt"
            bar.advance(len(shard))
            yield number, outcomes
            answered[number].unlink(missing_ok=True)

    @property
    def _dtype(self) -> str:
        return self.settings.dtype or str(self.plan.target.model.dtype).removeprefix("torch.")

    def _request(self, shards: Mapping[int, Sequence[Task]], files: Mapping[int, Path]) -> dict[str, Any]:
        plan = self.plan
        folder = resolve_folder(plan.target.name)
        if fingerprint_of(folder) != plan.target.fingerprint:
            raise DataError(f"{folder}: differs from the loaded target ({plan.target.name}); set target to its folder")
        longest = max(len(task.prompt) for shard in shards.values() for task in shard)
        return {
            "target": str(folder.resolve()),
            "dtype": self._dtype,
            "memory_gb": self.settings.memory_gb,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "on_cuda": plan.target.device.type == "cuda",
            "max_model_len": longest + plan.max_new_tokens,
            "max_num_seqs": plan.batch_size,
            "max_tokens": plan.max_new_tokens,
            "ends": list(plan.target.eos_token_ids),
            "shards": [
                {"file": str(files[number].resolve()), "texts": [self._text(task) for task in shard]}
                for number, shard in shards.items()
            ],
        }

    def _text(self, task: Task) -> dict[str, Any]:
        return {
            "prompt": list(task.prompt),
            "temperature": task.sampling.temperature,
            "top_p": task.sampling.top_p,
            "top_k": task.sampling.top_k,
            "seed": stream_seed(self.plan.seed, "engine", task.id) % LARGEST_SEED,
        }

    def _outcome(self, text: Mapping[str, Any]) -> Outcome:
        tokens, finish = text["tokens"], text["finish"]
        reason = unusable(tokens, finish, ends=self.plan.target.eos_token_ids, max_new_tokens=self.plan.max_new_tokens)
        if reason:
            return Outcome(None, reason, {"retries": 0})
        return Outcome(tokens, account={"finish": finish, "ids": "served", "retries": 0})
