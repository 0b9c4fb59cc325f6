"""Export as GGUF, the file of llama.cpp: Llama and Qwen drafters with their tokenizer. Tried with llama.cpp b11549.

V = vocabulary, D = hidden, Q = rows of a head's projection
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from drafttrain.checkpoint import ABOUT
from drafttrain.core.errors import CheckpointError
from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import kind_of, read_files
from drafttrain.export.gguf_file import FILE, read_gguf, write_gguf
from drafttrain.export.gguf_tokenizer import GgufTokenizer
from drafttrain.export.layout import layout_problems
from drafttrain.target_model.gguf_config import FREQUENCIES, llama3_factors


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp implements a model type."""

    permuted: bool
    """It rotates adjacent rows of queries and keys; Hugging Face rotates the two halves of a head."""
    biases: tuple[str, ...] = ()
    """The projections that may have a bias."""


ATTENTION = ("attn_q", "attn_k", "attn_v")
ARCHITECTURES = {
    "llama": Architecture(permuted=True, biases=(*ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "qwen2": Architecture(permuted=False, biases=ATTENTION),
    "qwen3": Architecture(permuted=False),
}

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
YARN_DEFAULTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
"""llama.cpp's defaults of YaRN; other values cannot be written."""


@dataclass
class GgufFormat:
    """What llama.cpp loads: one file with weights, settings and tokenizer."""


@exporters.register("gguf", GgufFormat)
class GgufExporter(Exporter):
    """Plain language models only: matrices in their own type, vectors in float32, which holds them exactly."""

    reads: ClassVar[Mapping[str, str]] = {"causal_lm": "draft-simple"}
    readers = "llama.cpp"
    fields_in = FILE

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what llama.cpp cannot hold or would read differently."""
        found = config_problems(source.config)
        found = found or [*layout_problems(source, target_config), *_tensor_problems(source)]
        return found or _tokenizer_of(source).problems(source.config)

    def target_problems(self, folder: Path, *, num_rows: int, end: int | None) -> list[str]:
        """Return what llama.cpp cannot hold of the target's tokenizer, which is the drafter's too."""
        return GgufTokenizer(folder, vocab_size=num_rows).problems({"eos_token_id": end})

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return metadata and tensors under GGUF's names."""
        config = _with_defaults(source.config)
        tokenizer = _tokenizer_of(source)
        tensors = {name_of(name): _as_stored(name_of(name), value, config) for name, value in source.tensors.items()}
        tensors |= _frequencies(config)
        name = source.folder.name if source.folder else "drafter"
        metadata = _metadata(config, name=name, dtype=_dtype(source)) | tokenizer.fields(source.config)
        return replace(source, config=metadata, tensors=tensors, notes=tokenizer.notes(source.config))

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return nothing: refusals() covers all problems of a file that equals its source."""
        return []

    def write(self, files: DrafterFiles, source: Path, folder: Path) -> None:
        """Write the file, and copy drafttrain.json beside it."""
        write_gguf(folder / FILE, files.config, files.tensors)
        if (source / ABOUT).exists():
            shutil.copyfile(source / ABOUT, folder / ABOUT)

    def read(self, folder: Path) -> DrafterFiles:
        """Return the contents of the file in a folder."""
        metadata, tensors = read_gguf(folder / FILE)
        return DrafterFiles(kind_of(folder), metadata, tensors, folder=folder)

    def holds(self, folder: Path) -> bool:
        """Return whether a folder has such a file."""
        return (folder / FILE).is_file()


def write_model(folder: Path, path: Path, *, dtype: str | None = None) -> None:
    """Write the model of a Hugging Face folder, such as a target, as a GGUF file.

    Args:
        dtype: Type of its matrices; None: their own.

    Raises:
        CheckpointError: llama.cpp would drop or misread something.
    """
    files, exporter = read_files(folder), GgufExporter()
    if dtype is not None:
        files = replace(files, tensors={n: value.to(getattr(torch, dtype)) for n, value in files.tensors.items()})
    if found := exporter.refusals(files, files.config):
        raise CheckpointError("\n  ".join([f"{folder}: cannot be written as GGUF", *found[:20]]))
    made = exporter.convert(files, files.config)
    write_gguf(path, made.config, made.tensors)


def name_of(name: str) -> str:
    """Return GGUF's name for a tensor of a Hugging Face checkpoint."""
    stem, _, suffix = name.rpartition(".")
    in_layer = LAYER.fullmatch(stem)
    if in_layer:
        return f"blk.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.{suffix}"
    return f"{OUTSIDE[stem]}.{suffix}"


def permuted(weight_QD: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """Return the rows of a query or key projection, or of its bias, reordered so that rows that rotate together are adjacent."""
    halves = weight_QD.reshape(num_heads, 2, -1, *weight_QD.shape[1:])
    return halves.transpose(1, 2).reshape(weight_QD.shape)


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return the fields of a config.json that llama.cpp cannot hold or ignores."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return [f"config.json: model_type is {kind!r}: only {', '.join(ARCHITECTURES)} can be written as GGUF"]
    config, found = _with_defaults(config), []
    if config["hidden_act"] != "silu":
        found.append(f"config.json: hidden_act is {config['hidden_act']!r}: llama.cpp always computes silu")
    if "quantization_config" in config:
        found.append("config.json: quantization_config: weights must be float32, float16 or bfloat16")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        found.append("config.json: use_sliding_window: llama.cpp attends to the whole text in this architecture")
    return found + _rope_problems(config)


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
    rope = config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return [f"config.json: rope_parameters.rope_type is {kind!r}: only {', '.join(ROPE_TYPES)} can be written"]
    found = []
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) not in (None, 1):
        found.append("config.json: partial_rotary_factor: llama.cpp rotates whole heads in this architecture")
    if kind == "yarn":
        found += [
            f"config.json: rope_parameters.{key} is {rope[key]!r}: only YaRN's default {value!r} can be written"
            for key, value in YARN_DEFAULTS.items()
            if rope.get(key, value) != value
        ]
    return found


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json under their newest names, with transformers' defaults for those left out."""
    from transformers import AutoConfig

    own = dict(config)
    known = AutoConfig.for_model(own.pop("model_type"), **own).to_dict()
    return {**config, **known}


def _tensor_problems(source: DrafterFiles) -> list[str]:
    found = []
    places = ARCHITECTURES[source.config["model_type"]].biases
    for name, value in source.tensors.items():
        if value.dtype not in FILE_TYPES:
            found.append(f"{name}: is {value.dtype}, must be float32, float16 or bfloat16")
        if name.endswith(".bias") and name_of(name).split(".")[-2] not in places:
            found.append(f"{name}: llama.cpp has no such bias in {source.config['model_type']}")
    if len({value.dtype for value in source.tensors.values() if value.dim() > 1}) > 1:
        found.append("model.safetensors: matrices of several types: a GGUF file names one type")
    return found


def _tokenizer_of(source: DrafterFiles) -> GgufTokenizer:
    assert source.folder is not None, "the files were read from a folder"
    return GgufTokenizer(source.folder, vocab_size=source.config["vocab_size"])


def _dtype(source: DrafterFiles) -> torch.dtype:
    return next(value.dtype for value in source.tensors.values() if value.dim() > 1)


def _as_stored(name: str, value: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor in the layout and type of the file."""
    part = name.split(".")[-2]
    if ARCHITECTURES[config["model_type"]].permuted and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        value = permuted(value, num_heads=heads)
    return value.contiguous() if value.dim() > 1 else value.float()


def _metadata(config: Mapping[str, Any], *, name: str, dtype: torch.dtype) -> dict[str, Any]:
    kind, size = config["model_type"], _head_size(config)
    rope = config["rope_parameters"]
    own = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": _single(config["rms_norm_eps"]),
        "rope.dimension_count": size,
        "rope.freq_base": _single(rope["rope_theta"]),
        **_scaling(rope),
    }
    general = {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
    }
    return general | {f"{kind}.{key}": value for key, value in own.items()}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields for scaled positions; the scaling of llama3 is a tensor instead."""
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": _single(rope["factor"])}
    if kind == "yarn":
        scaling["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return scaling


def _frequencies(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the factor by which the scaling of llama3 divides each frequency."""
    if config["rope_parameters"].get("rope_type") != "llama3":
        return {}
    from transformers import AutoConfig

    own = dict(config)
    return {FREQUENCIES: llama3_factors(AutoConfig.for_model(own.pop("model_type"), **own))}


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _single(value: float) -> float:
    """Return a number rounded to float32."""
    return float(np.float32(value))
