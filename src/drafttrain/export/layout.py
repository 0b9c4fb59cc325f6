"""What the files of each kind must hold, by name and shape: loaders silently drop unknown tensors and leave missing norms at one.

V = the target's vocabulary, R = the drafter's, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from drafttrain.core.printable import shown
from drafttrain.drafters.dflash.config import block_problems
from drafttrain.drafters.dflash.dflash import DFlash
from drafttrain.drafters.dflash2 import dflash2
from drafttrain.drafters.domino import domino
from drafttrain.drafters.draft_vocabulary import token_map_problems, vocabulary_problems
from drafttrain.drafters.dspark.dspark import DSpark
from drafttrain.drafters.dspark.markov import head_shapes
from drafttrain.drafters.eagle import eagle1, eagle3
from drafttrain.drafters.eagle.config_problems import config_problems
from drafttrain.drafters.eagle.eagle1 import FC_BIAS
from drafttrain.drafters.mtp import module as mtp
from drafttrain.drafters.p_eagle import settings as p_eagle
from drafttrain.drafters.xpress import xpress
from drafttrain.export.drafter_files import DrafterFiles

OWN_FIELDS = {
    "eagle": eagle1.own_defaults,
    "eagle3": eagle3.own_defaults,
    "mtp": mtp.own_defaults,
    "dflash": DFlash.own_defaults,
    "dspark": DSpark.own_defaults,
    "p_eagle": p_eagle.own_defaults,
    "domino": domino.Domino.own_defaults,
    "xpress": xpress.XPress.own_defaults,
    "dflash2": dflash2.DFlash2.own_defaults,
}
"""The settings that the folders of these kinds store."""

Shapes = dict[str, tuple[int, ...]]


def layout_problems(files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
    """Return a line for everything in the files that differs from the layout of their kind; [] for kinds without a layout.

    Args:
        target_config: config.json of the target.
    """
    if files.kind not in LAYOUTS:
        return []
    if (
        files.kind in OWN_FIELDS
        and "drafttrain" in files.config
        and (wrong := config_problems(files.config, OWN_FIELDS[files.kind]()))
    ):
        return wrong
    if files.kind == "medusa" and (wrong := _medusa_counts(files)):
        return wrong
    shapes_of, further_problems = LAYOUTS[files.kind]
    try:
        shapes = shapes_of(files.config)
    except KeyError as error:
        return [f"config.json: {error.args[0]} is missing"]
    except Exception as error:  # transformers checks each model's fields in its own way
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return [f"config.json: no {files.kind} can be built from it: {message}"]
    return [
        *_tensor_problems(files, shapes),
        *further_problems(files),
        *rope_problems(files.config),
        *_target_problems(files.config, target_config),
    ]


def _tensor_problems(files: DrafterFiles, shapes: Shapes) -> list[str]:
    found = []
    for name in sorted(shapes.keys() | files.tensors.keys()):
        if name not in shapes:
            why = "this layout has no such bias" if name.endswith(".bias") else "this layout has no such tensor"
            found.append(f"{name}: {why}: loaders silently drop it, or refuse the file")
        elif name not in files.tensors:
            found.append(f"{name}: missing: loaders silently leave it at its initial values")
        elif tuple(files.tensors[name].shape) != shapes[name]:
            found.append(f"{name}: shape {list(files.tensors[name].shape)}, must be {list(shapes[name])}")
    return found


def rope_problems(config: Mapping[str, Any]) -> list[str]:
    """Return where rope_theta and rope_scaling, which older loaders read, differ from rope_parameters, which newer ones read."""
    new, theta, scaling = (config.get(key) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
    if not (isinstance(new, Mapping | None) and isinstance(scaling, Mapping | None)):
        return ["config.json: rope_parameters and rope_scaling must be mappings"]
    found = []
    if new is not None and theta is not None and new.get("rope_theta") != theta:
        found.append(f"config.json: rope_theta is {theta}, rope_parameters.rope_theta {new.get('rope_theta')}")
    if new is not None and "rope_scaling" in config:
        ours, theirs = _scaling(new), _scaling(scaling or {})
        if ours["rope_type"] != theirs["rope_type"]:
            found.append(
                f"config.json: rope_scaling is of type {theirs['rope_type']}, rope_parameters of type {ours['rope_type']}"
            )
        else:
            found += [
                f"config.json: rope_scaling.{key} is {theirs.get(key)}, rope_parameters.{key} {ours.get(key)}"
                for key in sorted(ours.keys() | theirs.keys())
                if ours.get(key) != theirs.get(key)
            ]
    partial = {**config, **(new or {})}.get("partial_rotary_factor", 1)
    if config.get("drafttrain") is not None and partial not in (None, 1):
        found.append(
            f"config.json: partial_rotary_factor is {partial}: this layer was trained with rotation of whole heads"
        )
    return found


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scaling in a field; `type` is the older name of `rope_type`."""
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type", "partial_rotary_factor")}
    return {"rope_type": rope.get("type", "default"), **rest}


def _target_problems(config: Mapping[str, Any], target_config: Mapping[str, Any]) -> list[str]:
    wanted = text_config(target_config).get("vocab_size")
    if wanted is not None and config.get("vocab_size") != wanted:
        return [f"config.json: vocab_size is {config.get('vocab_size')}, the target's is {wanted}"]
    return []


def counts_outputs(config: Mapping[str, Any]) -> bool:
    """Return whether taps are in `eagle_config` only, where SGLang reads them as blocks whose output is used."""
    return "eagle_config" in config and "eagle_aux_hidden_state_layer_ids" not in config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model."""
    part: Mapping[str, Any] = config.get("text_config", config)
    return part


def _layer_shapes(config: Mapping[str, Any], *, prefix: str, input_size: int) -> Shapes:
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        f"{prefix}self_attn.q_proj.weight": (queries, input_size),
        f"{prefix}self_attn.k_proj.weight": (keys, input_size),
        f"{prefix}self_attn.v_proj.weight": (keys, input_size),
        f"{prefix}self_attn.o_proj.weight": (width, queries),
        f"{prefix}mlp.gate_proj.weight": (inner, width),
        f"{prefix}mlp.up_proj.weight": (inner, width),
        f"{prefix}mlp.down_proj.weight": (width, inner),
        f"{prefix}post_attention_layernorm.weight": (width,),
    }


def _eagle_shapes(config: Mapping[str, Any]) -> Shapes:
    width = config["hidden_size"]
    bias: Shapes = {"fc.bias": (width,)} if config.get(FC_BIAS) else {}
    return {"fc.weight": (width, 2 * width), **bias, **_layer_shapes(config, prefix="layers.0.", input_size=width)}


def _eagle3_shapes(config: Mapping[str, Any]) -> Shapes:
    width, rows = config["hidden_size"], config["draft_vocab_size"]
    target_width, count = (
        config.get("target_hidden_size") or width,
        len(config["eagle_aux_hidden_state_layer_ids"] or ()),
    )
    shapes = {
        "fc.weight": (width, count * target_width),
        **_layer_shapes(config, prefix="midlayer.", input_size=2 * width),
        "midlayer.input_layernorm.weight": (width,),
        "midlayer.hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    if rows != config["vocab_size"]:
        shapes |= {"d2t": (rows,), "t2d": (config["vocab_size"],)}
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (count * target_width,)
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{number}.weight": (target_width,) for number in range(count)}
    return shapes


def dflash_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a block drafter, under z-lab's names; with a head of its own, also those of the head."""
    width, size, rows = config["hidden_size"], config["head_dim"], config.get("draft_vocab_size")
    taps = len(config["dflash_config"]["target_layer_ids"])
    shapes: Shapes = {"fc.weight": (width, taps * width), "hidden_norm.weight": (width,), "norm.weight": (width,)}
    for number in range(config["num_hidden_layers"]):
        prefix = f"layers.{number}."
        shapes |= {f"{prefix}self_attn.{name}_norm.weight": (size,) for name in "qk"}
        shapes |= {f"{prefix}input_layernorm.weight": (width,)}
        shapes |= _layer_shapes(config, prefix=prefix, input_size=width)
    if rows is not None:
        shapes["lm_head.weight"] = (rows, width)
        if rows != config["vocab_size"]:
            shapes |= {"d2t": (rows,), "t2d": (config["vocab_size"],)}
    return shapes


def _p_eagle_shapes(config: Mapping[str, Any]) -> Shapes:
    width, shapes = config["hidden_size"], _eagle3_shapes(config)
    for number in range(1, config["num_hidden_layers"]):
        prefix = f"layers.{number}."
        shapes |= {
            **_layer_shapes(config, prefix=prefix, input_size=width),
            f"{prefix}input_layernorm.weight": (width,),
        }
    if config.get(p_eagle.OWN_EMBEDDING):
        shapes["embed_tokens.weight"] = (config["vocab_size"], width)
    return shapes | {"mask_hidden": (1, 1, shapes["fc.weight"][1])}


def _medusa_shapes(config: Mapping[str, Any]) -> Shapes:
    width, rows = config["hidden_size"], config.get("truncated_vocab_size") or config["vocab_size"]
    shapes: Shapes = {} if rows == config["vocab_size"] else {"token_map": (rows,)}
    for head in range(config["num_heads"]):
        if head == 0 or not config.get("original_lm_head"):
            shapes[f"lm_heads.{head}.weight"] = (rows, width)
        for layer in range(config["num_hidden_layers"]):
            shapes[f"blocks.{head}.layers.{layer}.weight"] = (width, width)
            if config.get("medusa_fc_bias"):
                shapes[f"blocks.{head}.layers.{layer}.bias"] = (width,)
    return shapes


def _medusa_counts(files: DrafterFiles) -> list[str]:
    """Return whether the numbers of heads and blocks, from which all shapes follow, are out of the range that the file allows."""
    return [
        f"config.json: {key} must be a whole number of 1..{len(files.tensors)}, the number of tensors in the file, got {shown(value)}"
        for key in ("num_heads", "num_hidden_layers")
        if (value := files.config.get(key)) is not None
        and (type(value) is not int or not 1 <= value <= len(files.tensors))
    ]


def _causal_lm_shapes(config: Mapping[str, Any]) -> Shapes:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    own = dict(config)
    made = AutoConfig.for_model(own.pop("model_type"), **own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    tied = set(getattr(model, "all_tied_weights_keys", {}) if made.tie_word_embeddings else ())
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    # In memory the experts of a layer are one tensor; in files, which engines read, each expert has its own.
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, held).items()}


def _no_problems(files: DrafterFiles) -> list[str]:
    return []


def _eagle3_problems(files: DrafterFiles) -> list[str]:
    """Return the problems of the taps and of the map from the drafter's vocabulary to the target's."""
    taps = list(files.config["eagle_aux_hidden_state_layer_ids"] or ())
    found = []
    number = files.config.get(eagle3.NUM_TAPS)
    if number != len(taps) and (number is not None or len(taps) != 3):
        found.append(
            f"config.json: {eagle3.NUM_TAPS} is {shown(number)}, must be {len(taps)}, the number of taps: loaders make fc for it, "
            "or for three if it is missing"
        )
    if any(type(tap) is not int for tap in taps):
        return [f"config.json: eagle_aux_hidden_state_layer_ids must be a list of whole numbers, got {shown(taps)}"]
    if taps != sorted(set(taps)):
        found.append(
            f"config.json: eagle_aux_hidden_state_layer_ids is {taps}: loaders read the states in the order of the layers, "
            "whatever the order here: list them in rising order, and reorder the columns of fc.weight with them"
        )
    if "d2t" in files.tensors and "t2d" in files.tensors:
        found += vocabulary_problems(files.tensors["d2t"], files.tensors["t2d"])
    return found


def _dflash_problems(files: DrafterFiles) -> list[str]:
    """Return the problems of the block, and of the map from the drafter's vocabulary to the target's."""
    found = [f"config.json: {problem}" for problem in block_problems(files.config)]
    if "d2t" in files.tensors and "t2d" in files.tensors:
        found += vocabulary_problems(files.tensors["d2t"], files.tensors["t2d"])
    return found


def _dspark_shapes(config: Mapping[str, Any]) -> Shapes:
    return {**dflash_shapes(config), **head_shapes(config)}


def _domino_shapes(config: Mapping[str, Any]) -> Shapes:
    return {**dflash_shapes(config), **domino.head_shapes(config)}


def _xpress_shapes(config: Mapping[str, Any]) -> Shapes:
    return {**dflash_shapes(config), **xpress.head_shapes(config)}


def _dflash2_shapes(config: Mapping[str, Any]) -> Shapes:
    return {**dflash_shapes(config), **dflash2.further_shapes(config)}


def _medusa_problems(files: DrafterFiles) -> list[str]:
    """Return the keys that loaders mistake for the number of heads, and the problems of the map to the target's vocabulary."""
    wrong = [key for key in files.config if "num" in key and "heads" in key and key != "num_heads"]
    found = [f"config.json: {key}: loaders mistake it for num_heads: leave it out" for key in wrong]
    if "token_map" in files.tensors:
        found += token_map_problems(files.tensors["token_map"], vocab_size=files.config["vocab_size"])
    return found


LAYOUTS: dict[str, tuple[Callable[[Mapping[str, Any]], Shapes], Callable[[DrafterFiles], list[str]]]] = {
    "causal_lm": (_causal_lm_shapes, _no_problems),
    "sorted_lm": (_causal_lm_shapes, _no_problems),
    "matformer": (_causal_lm_shapes, _no_problems),
    "medusa": (_medusa_shapes, _medusa_problems),
    "eagle": (_eagle_shapes, _no_problems),
    "eagle3": (_eagle3_shapes, _eagle3_problems),
    "dflash": (dflash_shapes, _dflash_problems),
    "dspark": (_dspark_shapes, lambda files: [*_dflash_problems(files), *DSpark.problems_of(files.config)]),
    "p_eagle": (_p_eagle_shapes, lambda files: [*_eagle3_problems(files), *p_eagle.field_problems(files.config)]),
    "domino": (_domino_shapes, lambda files: [*_dflash_problems(files), *domino.field_problems(files.config)]),
    "xpress": (_xpress_shapes, lambda files: [*_dflash_problems(files), *xpress.field_problems(files.config)]),
    "dflash2": (_dflash2_shapes, lambda files: [*_dflash_problems(files), *dflash2.field_problems(files.config)]),
    "mtp": (mtp.tensor_shapes, lambda files: mtp.field_problems(files.config)),
}
