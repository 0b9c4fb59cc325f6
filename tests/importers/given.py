"""Folders in the layouts of other projects, for a target of width 32 with 257 tokens; random, and every tensor has an effect.

V = the target's vocabulary, R = the drafter's
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.target_model import Target

WIDTH, INNER, VOCABULARY, ROWS = 32, 48, 257, 100
TAPS = [1, 2, 3]

LLAMA: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
}


def drawn(shapes: dict[str, tuple[int, ...]], *, seed: int = 3) -> dict[str, Tensor]:
    """Return random tensors: matrices of deviation 0.2, vectors around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.2 if len(shape) == 2 else 0.3) * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def block() -> dict[str, tuple[int, ...]]:
    """Return the shapes of z-lab's block of two layers, which reads two states."""
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (32, 2 * WIDTH),
        "hidden_norm.weight": (32,),
        "norm.weight": (32,),
    }
    for number in range(2):
        shapes |= layer(f"layers.{number}.", reads=WIDTH)
        shapes |= {f"layers.{number}.input_layernorm.weight": (WIDTH,)}
        shapes |= {f"layers.{number}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
    return shapes


def layer(prefix: str, *, reads: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (32, reads),
        f"{prefix}self_attn.k_proj.weight": (16, reads),
        f"{prefix}self_attn.v_proj.weight": (16, reads),
        f"{prefix}self_attn.o_proj.weight": (WIDTH, 32),
        f"{prefix}mlp.gate_proj.weight": (INNER, WIDTH),
        f"{prefix}mlp.up_proj.weight": (INNER, WIDTH),
        f"{prefix}mlp.down_proj.weight": (WIDTH, INNER),
        f"{prefix}post_attention_layernorm.weight": (WIDTH,),
    }


def drafter_ids(*, seed: int = 4) -> Tensor:
    """Return the target ids in the drafter's vocabulary, in rising order."""
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:ROWS].sort().values


def eagle3_tensors(prefix: str = "midlayer.") -> dict[str, Tensor]:
    """Return an official EAGLE-3 file: d2t of offsets."""
    tensors = drawn(
        {
            "fc.weight": (WIDTH, 3 * WIDTH),
            **layer(prefix, reads=2 * WIDTH),
            f"{prefix}input_layernorm.weight": (WIDTH,),
            f"{prefix}hidden_norm.weight": (WIDTH,),
            "norm.weight": (WIDTH,),
            "lm_head.weight": (ROWS, WIDTH),
        }
    )
    ids_R = drafter_ids()
    t2d_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    t2d_V[ids_R] = True
    return {**tensors, "d2t": ids_R - torch.arange(ROWS), "t2d": t2d_V}


def eagle3_config(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **LLAMA,
        "draft_vocab_size": ROWS,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": TAPS,
        **more,
    }


def specforge_config() -> dict[str, Any]:
    """Return a configuration with the fields of a Qwen target, whose head is tied: the drafter's is not."""
    qwen = {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False, "attention_dropout": 0.0}
    return eagle3_config(**qwen, tie_word_embeddings=True)


def modelopt_config() -> dict[str, Any]:
    """Return a configuration whose taps count the outputs of blocks, with all fields that ModelOpt's exports have on the layer."""
    config = eagle3_config(
        eagle_config={
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": None,
        }
    )
    del config["eagle_aux_hidden_state_layer_ids"]
    return config


def speculators_config(target: str) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "has_no_defaults_at_init": False,
        "embed_requires_grad": False,
        "draft_vocab_size": ROWS,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": TAPS,
        "tie_word_embeddings": False,
        "transformer_layer_config": {"model_type": "llama", **LLAMA},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": target, "architectures": ["LlamaForCausalLM"]},
        },
    }


def p_eagle_tensors(prefix: str = "midlayer.", *, embedding: bool = False) -> dict[str, Tensor]:
    """Return EAGLE-3's file with a second layer and the vector of the mask slots."""
    more: dict[str, tuple[int, ...]] = {
        **layer("layers.1.", reads=WIDTH),
        "layers.1.input_layernorm.weight": (WIDTH,),
        "mask_hidden": (1, 1, 3 * WIDTH),
        **({"embed_tokens.weight": (VOCABULARY, WIDTH)} if embedding else {}),
    }
    return {**eagle3_tensors(prefix), **drawn(more, seed=6)}


def p_eagle_config(**more: Any) -> dict[str, Any]:
    return eagle3_config(num_hidden_layers=2, pard_token=VOCABULARY - 1, **more)


def speculators_p_eagle_config(target: str) -> dict[str, Any]:
    config = speculators_config(target)
    config["transformer_layer_config"]["num_hidden_layers"] = 2
    return config | {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "embed_requires_grad": True,
        "mask_token_id": VOCABULARY - 1,
    }


def eagle_tensors() -> dict[str, Tensor]:
    return drawn({"fc.weight": (WIDTH, 2 * WIDTH), **layer("layers.0.", reads=WIDTH)})


def medusa_tensors(*, heads: int = 3, layers: int = 2) -> dict[str, Tensor]:
    """Return the authors' file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for block in range(layers):
            shapes |= {f"{head}.{block}.linear.weight": (WIDTH, WIDTH), f"{head}.{block}.linear.bias": (WIDTH,)}
        shapes[f"{head}.{layers}.weight"] = (VOCABULARY, WIDTH)
    return drawn(shapes)


def vllm_medusa_tensors(*, heads: int = 3, layers: int = 2, bias: bool = True) -> dict[str, Tensor]:
    """Return the same under vLLM's names."""
    made = {}
    for name, tensor in medusa_tensors(heads=heads, layers=layers).items():
        head, block, *rest = name.split(".")
        if rest == ["weight"]:
            made[f"lm_heads.{head}.weight"] = tensor
        elif bias or rest[-1] == "weight":
            made[f"blocks.{head}.layers.{block}.{rest[-1]}"] = tensor
    return made


def cut_medusa_tensors(*, whole: bool = False) -> dict[str, Tensor]:
    """Return heads that share one output matrix over a part of the vocabulary.

    Args:
        whole: The matrix has all rows, of which vLLM's loader takes those of the map.
    """
    ids_R, tensors = drafter_ids(), vllm_medusa_tensors()
    shared = tensors["lm_heads.0.weight"]
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.")}
    return {**blocks, "lm_heads.0.weight": shared if whole else shared[ids_R], "token_map": ids_R}


def cut_medusa_config() -> dict[str, Any]:
    return vllm_medusa_config(truncated_vocab_size=ROWS, original_lm_head=True)


def medusa_config(target: str, *, heads: int = 3, layers: int = 2) -> dict[str, Any]:
    return {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": target}


def vllm_medusa_config(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_heads": 3, "num_hidden_layers": 2}
    return {"model_type": "medusa", "architectures": ["MedusaModel"], **sizes, "medusa_fc_bias": True, **more}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, file: str = "model.safetensors") -> Path:
    """Write a folder of somebody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder


def held(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a drafter folder."""
    return load_file(folder / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether two files hold the same tensors under the same names."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def made(layout: str, target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a sound file and configuration of a layout."""
    return {
        "eagle3": lambda: (eagle3_tensors(), eagle3_config()),
        "p_eagle": lambda: (p_eagle_tensors(), p_eagle_config()),
        "speculators": lambda: (eagle3_tensors("layers.0."), speculators_config(target.name)),
        "eagle": lambda: (eagle_tensors(), {"architectures": ["EagleLlamaForCausalLM"], **LLAMA}),
        "medusa": lambda: (medusa_tensors(), medusa_config(target.name)),
        "vllm medusa": lambda: (vllm_medusa_tensors(), vllm_medusa_config()),
        "cut medusa": lambda: (cut_medusa_tensors(), cut_medusa_config()),
    }[layout]()
