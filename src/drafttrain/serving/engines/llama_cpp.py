"""llama.cpp: its own server, as `xllamacpp` builds it for PyPI. Tried with 2026.10.11549 (llama.cpp b11549).

It drafts chains greedily, or with `--spec-draft-sampling probabilistic` from the ten likeliest tokens of the drafter.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.console import say
from drafttrain.core.files import sha256_of, written_beside
from drafttrain.environments.environment import root
from drafttrain.environments.known import LLAMA_CPP
from drafttrain.export.convert import read_target_config
from drafttrain.export.gguf import GgufExporter, write_model
from drafttrain.export.gguf_file import FILE
from drafttrain.export.gguf_tokenizer import END, SECOND_END, TOKENS, GgufTokenizer
from drafttrain.serving.engines import Conventions, DecodedPrompt, Job, ServingEngine, Use, engines
from drafttrain.target_model.folders import fingerprint_of
from drafttrain.target_model.gguf_folder import gguf_file_of

ENDS = frozenset(
    [
        "<|endoftext|>",
        "<|end|>",
        "<|im_end|>",
        "<|ifm|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<|tool_response>",
        "<eos>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
        "<|fim_pad|>",
        "<fim_pad>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<|file_sep|>",
    ]
)
"""Tokens that end a text in llama.cpp because of their text, whatever the model's configuration says."""

TARGETS = "llama.cpp-targets"
"""Folder of converted targets, beside the environments."""

CACHE_DTYPE = "float16"
"""Its default type of keys and values."""

DRAFT_TOP_K = 10
"""Of its probabilistic drafting; seen in its source and in its counters."""


@dataclass
class LlamaCpp:
    """llama.cpp in its own environment."""


@engines.register("llama.cpp", LlamaCpp)
class LlamaCppEngine(ServingEngine):
    """The server of llama.cpp in the worker's process, reached over HTTP."""

    environment = LLAMA_CPP
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    formats = ("gguf",)
    methods: ClassVar[Mapping[str, str]] = GgufExporter.reads

    def draft(self, kind: str, wanted: str) -> str:
        """Return how it drafts: both ways."""
        return wanted

    def conventions(self, target: Path) -> Conventions:
        """Return its conventions, with the tokens of the target's vocabulary that end a text."""
        config = read_target_config(target, name=str(target))
        fields = GgufTokenizer(target, vocab_size=config["vocab_size"]).fields(config)
        ends = {fields[key] for key in (END, SECOND_END) if key in fields}
        ends |= {number for number, token in enumerate(fields[TOKENS]) if token in ENDS}
        return Conventions(drafts_past_end=False, end_tokens=frozenset(ends), draft_top_k=DRAFT_TOP_K)

    def target_as(self, folder: Path, dtype: str | None = None) -> Path:
        """Return the target as a GGUF file: the one that it was made from, or one beside the environments.

        Each version of the weights, tokenizer and type is converted once. With a type, the file that the target was made from
        does not serve: llama.cpp would compute with its quantized weights.

        Raises:
            CheckpointError: The target cannot be written as GGUF.
        """
        if dtype is None and (file := gguf_file_of(folder)) is not None:
            return file
        parts = [fingerprint_of(folder), sha256_of(folder / "tokenizer.json"), str(dtype)]
        key = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
        path = root() / TARGETS / f"{key}.gguf"
        if not path.exists():
            say(f"llama.cpp: converting the target to {path}")
            with written_beside(path) as temporary:
                write_model(folder, temporary, dtype=dtype)
        return path

    def request(self, job: Job, use: Use | None) -> dict[str, Any]:
        """Return the request that llama_cpp_worker.py describes."""
        shipped = job.as_served and gguf_file_of(job.target) is not None
        return {
            "target": str(self.target_as(job.target, None if shipped else job.dtype)),
            "drafter": None if use is None else str(Path(use.folder) / FILE),
            "num_draft_tokens": 0 if use is None else use.num_draft_tokens,
            "draft": "probabilistic" if use is not None and use.draft == "sampled" else "greedy",
            "dtype": CACHE_DTYPE if shipped else job.dtype,
            "context": job.max_length,
            "prompts": [list(prompt) for prompt in job.prompts],
            "max_tokens": job.new_tokens,
            "warm_up": job.as_served,
            "runs": [{"temperature": t, "seed": 0} for t in job.temperatures],
            "texts": [],
        }

    def decoded(self, answer: Mapping[str, Any]) -> list[list[DecodedPrompt]]:
        """Return the outputs of every run."""
        return [[DecodedPrompt(**prompt) for prompt in run["prompts"]] for run in answer["runs"]]

    def problems(self, drafter: Path, kind: str, target_config: Mapping[str, Any]) -> list[str]:
        """Return nothing: a drafter that llama.cpp cannot run is not exported as GGUF."""
        return []

    def command(self, target: str, use: Use) -> str:
        """Return `llama-server ...`. Without --spec-type it would load the drafter and never use it."""
        sampled = " --spec-draft-sampling probabilistic" if use.draft == "sampled" else ""
        model = target if target.endswith(".gguf") else f"{target}.gguf"
        return (
            f"llama-server -m {shlex.quote(model)} -md {shlex.quote(f'{use.folder}/{FILE}')} --spec-type {self.methods[use.kind]} "
            f"--spec-draft-n-max {use.num_draft_tokens}{sampled} --metrics"
        )
