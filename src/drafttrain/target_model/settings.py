"""Settings of the target: which model, in which type, on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drafttrain.core.settings import setting


@dataclass
class TargetSettings:
    """The frozen model whose output distribution must be preserved."""

    model: str | None = setting(
        "builtin:target",
        help="A local folder, a GGUF file, a hub id, builtin:target, known:smollm2, known:gemma3, or recipe:NAME for that recipe's model; null: "
        "only a tokenizer.",
    )
    tokenizer: str | None = setting(None, help="Folder, GGUF file or hub id of the tokenizer; null: the model's own.")
    revision: str | None = setting(None, help="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64", "stored"] = setting(
        "auto",
        help="Type of the target's weights in memory. auto: on CUDA, above a billion weights, the 16-bit type of its files, "
        "or bfloat16; on a CPU, above 50 million weights, bfloat16 where a measurement at start finds it faster; else "
        "float32. stored: as in its files. A resumed run keeps its first type.",
    )
    device: str = setting("auto", help="cpu, cuda, cuda:1 ...; auto: cuda if available.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", help="Attention implementation of transformers."
    )
    images: bool = setting(
        False,
        help="Load the vision tower and projector of a multimodal model too: records and prompts may then have `images`.",
    )
    trust_remote_code: bool = setting(False, help="Run Python code from the model's folder.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.model is None and self.tokenizer is None:
            return ["model: null needs a tokenizer: set target.tokenizer"]
        return []
