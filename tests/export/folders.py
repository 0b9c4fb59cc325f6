"""Drafter folders of every kind on a tiny target, as training exports them, and ways to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from drafttrain.checkpoint import About, write_about
from drafttrain.drafters import drafters
from drafttrain.target_model import Target

SETTINGS: dict[str, dict[str, Any]] = {
    "causal_lm": {"num_layers": 1, "hidden_size": 32, "num_heads": 1},
    "sorted_lm": {"num_layers": 2, "hidden_size": 32, "num_heads": 1},
    "matformer": {"num_layers": 1, "hidden_size": 32, "num_heads": 1},
    "medusa": {"num_heads": 3},
    "eagle": {},
    "eagle3": {"draft_vocab_size": 100},
    "mtp": {"init": "random"},
    "hidden_transfer": {"num_steps": 2},
    "chimera": {"draft_vocab_size": 100, "num_steps": 3},
    "p_eagle": {"draft_vocab_size": 100, "num_layers": 2, "num_depths": 3, "mask_token_id": 1},
    "kangaroo": {"exit_layer": 1},
    "domino": {"num_layers": 2, "block_size": 4, "gru_hidden_dim": 8, "emb_dim": 6, "mask_token_id": 1},
    "xpress": {"num_layers": 2, "taps": [1, 3], "block_size": 4, "mask_token_id": 1, "rank": 6, "mlp_hidden": 8},
    "dspark": {"num_layers": 2, "taps": [1, 3], "block_size": 3, "mask_token_id": 1, "markov_rank": 6},
    "dflash2": {"num_layers": 2, "block_size": 4, "selector_rank": 6, "selector_top_k": 5, "mask_token_id": 1},
    "dflash": {"num_layers": 2, "taps": [1, 3], "block_size": 4, "mask_token_id": 1},
}


def drafter_of(kind: str, target: Target, *, seed: int = 1, scale: float = 0.2, **settings: Any) -> Any:
    """Return a random drafter whose every tensor matters: no norm of ones, no bias of zeros, taps that differ.

    Args:
        scale: Deviation of the matrices; large ones learn badly.
    """
    torch.manual_seed(seed)
    entry: Any = drafters.entry(kind)
    made = entry.component.create(
        entry.settings(**(SETTINGS[kind] | settings)), target=target, tokenizer=target.tokenizer
    )
    made.fit_vocabulary(lambda: torch.arange(target.vocab_size).flip(0) % 7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith(("lm_head", "model.")):
                noise = torch.randn_like(parameter)
                parameter.copy_(noise.exp() if "norm" in name else scale * noise)
    return made.eval()


def save(drafter: Any, folder: Path, target: Target) -> Path:
    """Write a drafter as an exported folder."""
    folder.mkdir(parents=True)
    drafter.save(folder)
    target.tokenizer.save_pretrained(folder)
    about = About(
        drafter.kind, target.name, "", target.tokenizer_fingerprint, target.num_tokens, 0, draft=drafter.draft
    )
    write_about(folder, about)
    return folder


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """Change tensors and configuration of a folder in place."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def swap_taps(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    taps = config["eagle_aux_hidden_state_layer_ids"]
    config["eagle_aux_hidden_state_layer_ids"] = [taps[1], taps[0], taps[2]]


def swap_columns(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """What comes of taps that are written in another order than they were trained in."""
    early, middle, late = tensors["fc.weight"].chunk(3, dim=1)
    tensors["fc.weight"] = torch.cat([middle, early, late], dim=1)


def swap_feature_norms(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    first, second = "fc_norm.0.weight", "fc_norm.1.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def feed_back_before_norm(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["norm_output"] = False


def drop_number_of_taps(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Of both levels of the speculators format."""
    config.pop("num_aux_hidden_states", None)
    config.get("transformer_layer_config", {}).pop("num_aux_hidden_states", None)


def shift_d2t(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["d2t"] = tensors["d2t"] + 1


def drop_d2t(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors["d2t"]


def drop_hidden_norm(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors["midlayer.hidden_norm.weight"]


def alter_rope_theta(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rope_theta"] = 500.0


def alter_scaling(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """If both fields are there, loaders of transformers 5 read the older one."""
    config["rope_parameters"] = {**config["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}


def alter_rope_everywhere(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rope_theta"] = 500.0
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 500.0}


def truncate_down(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name][:, :-1]


def add_fc_bias(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["fc.bias"] = torch.randn(config["hidden_size"])


def forget_biases(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["medusa_fc_bias"] = False


def name_attention_heads(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["num_attention_heads"] = 2


def flatten_hidden_norm(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """What loaders make of a hidden_norm that is missing."""
    tensors["midlayer.hidden_norm.weight"] = torch.ones_like(tensors["midlayer.hidden_norm.weight"])


def swap_rows(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """What comes of a map between vocabularies that is shifted."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, dims=0)
