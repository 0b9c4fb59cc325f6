"""Tiny targets with a next-token-prediction layer in their folders: MiMo, and DeepSeek with latent attention and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.mimo import register_mimo
from tests.conftest import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), 0),
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}


def mimo_folder(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a MiMo model whose every tensor matters."""
    register_mimo()
    torch.manual_seed(seed)
    config = AutoConfig.for_model("mimo", **(SIZES | {"num_key_value_heads": 1} | sizes))
    tensors = _written(AutoModelForCausalLM.from_config(config), folder)
    width, first = config.hidden_size, "model.mtp_layers.0."
    layer = {name.replace("model.layers.0.", first): tensor for name, tensor in tensors.items() if ".layers.0." in name}
    layer |= {f"{first}input_proj.weight": torch.empty(width, 2 * width)}
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    layer |= {f"{first}{name}.weight": torch.empty(width) for name in norms}
    return _with_layer(folder, tensors, layer)


def deepseek_folder(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a DeepSeek-V3 model with latent attention and experts in its last blocks and in the layer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("deepseek_v3", **(SIZES | LATENT | sizes))
    tensors = _written(AutoModelForCausalLM.from_config(config), folder)
    width, last = config.hidden_size, config.num_hidden_layers - 1
    first = f"model.layers.{last + 1}."
    layer = {
        name.replace(f"model.layers.{last}.", first): tensor
        for name, tensor in tensors.items()
        if f".layers.{last}." in name
    }
    layer |= {f"{first}eh_proj.weight": torch.empty(width, 2 * width)}
    layer |= {f"{first}{name}.weight": torch.empty(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    return _with_layer(folder, tensors, layer)


def loaded(folder: Path, *, dtype: str = "float64") -> Target:
    """Return the target of a folder."""
    target = Target.load(TargetSettings(model=str(folder), dtype=dtype))
    if dtype == "float64":
        # The grouped product of transformers has no float64.
        target.model.set_experts_implementation("eager")
    return target


def _written(model: Any, folder: Path) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _with_layer(folder: Path, tensors: dict[str, Tensor], layer: dict[str, Tensor]) -> Path:
    generator = torch.Generator().manual_seed(7)
    for name, tensor in layer.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        layer[name] = 0.2 * drawn if tensor.ndim > 1 else 0.2 * drawn + ("norm" in name)
    save_file(tensors | layer, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder
