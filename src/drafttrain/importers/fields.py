"""config.json of somebody else's one-layer drafter: what each field may say, what a field left out means, and none that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from drafttrain.drafters.feature_layer import Rotary
from drafttrain.drafters.feature_target import ROPE_SCALINGS, llama_config, one_layer
from drafttrain.export.layout import rope_problems
from drafttrain.importers.target import TargetFiles

SILENT = (
    *("architectures", "auto_map", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "torchscript"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "initializer_range", "attention_dropout", "_attn_implementation"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
    *("max_window_layers", "layer_types"),
)
"""Fields that say nothing of what the layer computes."""

ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "num_hidden_layers": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "quantization_config": (),
}
"""Fields of which our layer has one form; null means the same."""

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
OTHERS = ("rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")

OF_ROPE = (
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
    "partial_rotary_factor",
)
"""Fields of rope_parameters, or of rope_scaling."""

DEFAULT_THETA, DEFAULT_EPS, DEFAULT_POSITIONS = 10000.0, 1e-6, 2048
"""What LlamaConfig takes where a file is silent."""


TENSORS_UNSEEN = "the tensors were not looked at"


def layer_problems(config: Mapping[str, Any], *, own: Iterable[str], prefix: str = "") -> list[str]:
    """Return one line for every field that is unknown, or says what our layer has no form for.

    Args:
        own: Fields of the drafter's kind beside those of its layer.
        prefix: Where in config.json.
    """
    other = [
        f"config.json: {prefix}{key} is {config[key]!r}, only {' or '.join(map(repr, (*allowed, None)))} is read here"
        for key, allowed in ONLY.items()
        if config.get(key) is not None and config[key] not in allowed
    ]
    return other + unknown_problems(config, known=[*SIZES, *OTHERS, *ONLY, *own], prefix=prefix)


def unknown_problems(config: Mapping[str, Any], *, known: Iterable[str], prefix: str = "") -> list[str]:
    """Return one line for every field that is neither known nor silent on what a drafter computes."""
    known = list(known)
    found = []
    for key, value in config.items():
        if key in known or key in SILENT:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        guess = f", is it {near[0]}?" if near else ""
        found.append(f"config.json: {prefix}{key} is {value!r}: unknown field{guess}")
    if found:
        found.append(
            f"config.json: known fields{f' of {prefix[:-1]}' if prefix else ''}: {', '.join(known)}. "
            "Take another out if it says nothing of what the drafter computes"
        )
    return found


def layer_fields(config: Mapping[str, Any], target: TargetFiles) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (the fields of one layer as we write them, problems, notes); no fields where a size is none."""
    found = size_problems(config, SIZES, may_lack=("num_key_value_heads", "head_dim"))
    if found:
        return {}, [*found, f"{TENSORS_UNSEEN}: their shapes follow from these fields"], []
    found += target_problems(config, target)
    rope, wrong, notes = _rope(config)
    found += wrong
    found += size_problems(config, ["max_position_embeddings"], may_lack=["max_position_embeddings"])
    eps, positions = config.get("rms_norm_eps"), config.get("max_position_embeddings")
    if eps is not None and not _is_positive(eps):
        found.append(f"config.json: rms_norm_eps must be a number above 0, got {eps!r}")
    if eps is None:
        notes.append(f"config.json: rms_norm_eps is left out: taken as {DEFAULT_EPS}, as Llama's loaders do")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        found.append(f"config.json: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if not config.get("head_dim") and width % heads:
        found.append(f"config.json: num_attention_heads {heads} does not divide hidden_size {width}: give head_dim")
    fields = one_layer(
        hidden_size=width,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=config.get("head_dim") or width // heads,
        rms_norm_eps=float(eps) if _is_positive(eps) else DEFAULT_EPS,
        max_position_embeddings=positions if _is_size(positions) else DEFAULT_POSITIONS,
        rope=rope,
    )
    fields["vocab_size"] = config["vocab_size"]
    return fields, found or _angle_problems(fields), notes


def size_problems(config: Mapping[str, Any], keys: Iterable[str], *, may_lack: Iterable[str] = ()) -> list[str]:
    """Return one line for every key that is no whole number of 1 or more."""
    return [
        f"config.json: {key} must be a whole number of 1 or more, {f'got {config[key]!r}' if key in config else 'it is missing'}"
        for key in keys
        if not (_is_size(config.get(key)) or (key in may_lack and config.get(key) is None))
    ]


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def target_problems(sizes: Mapping[str, Any], target: TargetFiles) -> list[str]:
    """Return where the sizes that features and tokens have are not the target's."""
    return [
        f"config.json: {key} is {sizes[key]}, the target {target.name} has {target.size(key)}: "
        "it was made for another target, give that one as --target"
        for key in ("hidden_size", "vocab_size")
        if isinstance(sizes.get(key), int) and sizes[key] != target.size(key)
    ]


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return what turns the positions: of rope_parameters, or of the two fields of before transformers 5."""
    new, theta, scaling = (config.get(key) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
    plain = {"rope_type": "default", "rope_theta": DEFAULT_THETA}
    wrong = [
        f"config.json: {key} must be a mapping or null, got {value!r}"
        for key, value in (("rope_parameters", new), ("rope_scaling", scaling))
        if value is not None and not isinstance(value, Mapping)
    ]
    if wrong:
        return plain, wrong, []
    given = dict(new if new is not None else scaling or {})
    kind = given.pop("type", None)
    rope = {"rope_type": kind or "default", **given}
    rope.setdefault("rope_theta", theta if theta is not None else DEFAULT_THETA)
    silent = theta is None and "rope_theta" not in given
    notes = (
        [f"config.json: rope_theta is left out: taken as {DEFAULT_THETA:g}, as Llama's loaders do"] if silent else []
    )
    found = [*rope_problems(config), *unknown_problems(rope, known=OF_ROPE, prefix="rope_parameters.")]
    allowed = ("default", *ROPE_SCALINGS)
    if not _is_positive(rope["rope_theta"]):
        found.append(f"config.json: rope_theta must be a number above 0, got {rope['rope_theta']!r}")
    elif rope["rope_type"] not in allowed:
        found.append(f"config.json: rope_type is {rope['rope_type']!r}, allowed: {', '.join(allowed)}")
    elif rope.get("partial_rotary_factor", 1) != 1:
        found.append(f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, only 1 is read here")
    return (plain if found else rope), found, notes


def _angle_problems(fields: dict[str, Any]) -> list[str]:
    """Return why the angles of positions cannot be computed: a scaling that lacks a number."""
    try:
        Rotary(llama_config(fields))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        kind, said = fields["rope_parameters"]["rope_type"], " ".join(f"{type(error).__name__}: {error}".split())
        return [f"config.json: the positions cannot be scaled as rope_type {kind!r} says: {said}"]
    return []
