"""vLLM on GPUs, which writes texts; exports are proven in its CPU build, whose facts are known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from drafttrain.data_gen.backends.vllm import ON_CUDA, WORKER
from drafttrain.export.vllm import READ_IN
from drafttrain.serving.engines import Installed, libraries


@dataclass
class VllmOnCuda:
    """vLLM on GPUs in an environment of its own."""


@libraries.register(ON_CUDA, VllmOnCuda)
class VllmWriter(Installed):
    """Writes the texts of `data.generate.backend: {kind: vllm}` where the target is on a GPU."""

    name = ON_CUDA
    pins = (f"vllm=={READ_IN}",)
    size = "some ten gigabytes, some minutes"
    worker = WORKER
    formats = ()
    methods: ClassVar[Mapping[str, str]] = {}
