"""config.json of a one-layer drafter trained elsewhere: allowed values, defaults of missing fields, and unknown fields."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from drafttrain.core.printable import shown
from drafttrain.drafters.eagle.layer import Rotary
from drafttrain.drafters.eagle.layer_config import ROPE_SCALINGS, llama_config, one_layer
from drafttrain.export.layout import rope_problems
from drafttrain.importers import Given
from drafttrain.importers.naming import listed, without
from drafttrain.importers.target import TargetFiles
from drafttrain.target_model.positions import UNLIMITED_POSITIONS

SILENT = (
    *("architectures", "auto_map", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "torchscript"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "initializer_range", "attention_dropout", "_attn_implementation"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "pretraining_tp"),
    *("model_type", "target_model_type", "decoder_sparse_step", "max_sequence_length"),
)
"""Fields that have no effect on what the layer computes, and are too common to report.

`model_type` has an effect in the speculators format only: in others the architecture means that the layer is Llama's.
"""

WINDOW = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
"""Fields that together decide whether the layer attends to the whole text."""

FURTHER = "further layers are not supported"
ATTENTION_BIAS = "the attention's projections would have biases"
MLP_BIAS = "the feed-forward block would have biases"
HEAD_NORMS = "queries and keys would be normed in each head, as in Qwen3"
FORMS = {
    FURTHER: re.compile(r"^layers\.[1-9]\d*\.|^additional_layers\."),
    ATTENTION_BIAS: re.compile(r"self_attn\.\w+\.bias$"),
    MLP_BIAS: re.compile(r"mlp\.\w+\.bias$"),
    HEAD_NORMS: re.compile(r"self_attn\.[qk]_norm\."),
    "the feed-forward block would be a mixture of experts": re.compile(r"mlp\.(experts|gate|shared_experts?)\."),
}
"""Forms of the layer that are not supported, and the tensors that only they have."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_hidden_layers": ((1,), FURTHER),
    "hidden_act": (("silu",), "the layer would have another activation"),
    "attention_bias": ((False,), ATTENTION_BIAS),
    "bias": ((False,), "engines read it as biases of the attention and of fc"),
    "mlp_bias": ((False,), MLP_BIAS),
    "qkv_bias": ((False,), ATTENTION_BIAS),
    "partial_rotary_factor": ((1,), "only part of each head would be rotated"),
    "rope_is_neox_style": ((True,), "other pairs of coordinates would be rotated"),
    "is_causal": ((True,), "the attention would look ahead"),
    "logit_scale": ((1,), "the drafter's logits would be scaled"),
    "use_aux_norm": ((False,), "it is SGLang's older name of fc_norm: use fc_norm"),
    "quantization_config": (({},), "quantized weights are not supported"),
    "compression_config": (({},), "quantized weights are not supported"),
}
"""Fields that have an effect: the supported values, and the effect of others; null is the same as a missing field."""

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
OTHERS = (
    *("rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    "original_max_position_embeddings",
)

OF_ROPE = (
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
    "partial_rotary_factor",
)
"""Supported fields of rope_parameters or rope_scaling."""

ROPE_ONLY: dict[str, tuple[Any, ...]] = {
    "alpha": (),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
    "apply_yarn_scaling": (True,),
    "use_fope": (False,),
}
"""Further fields of a scaling that vLLM 0.32.0 reads, and their values without effect."""

MROPE = ("mrope_section", "mrope_interleaved")
"""Fields of rotations along three axes for images; in text all three positions are equal."""

DEFAULT_THETA, DEFAULT_EPS = 10000.0, 1e-6
"""LlamaConfig's defaults."""

TYPO = 0.85
"""Similarity from which an unknown field counts as a misspelling of a missing one."""

TENSORS_UNSEEN = "the tensors were not checked"


def layer_problems(config: Mapping[str, Any], *, own: Iterable[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Return (problems, notes): a value that drafttrain's layer does not support is a problem, an unknown field a note.

    Args:
        own: Fields of the kind of drafter, besides those of its layer.
        prefix: Place of the fields in config.json.
    """
    own = tuple(own)
    other = [
        f"config.json: {prefix}{key} is {shown(config[key])}, must be {' or '.join(map(repr, (*allowed, None)))}: {effect}"
        for key, (allowed, effect) in ONLY.items()
        if key not in own and config.get(key) is not None and config[key] not in allowed
    ]
    found, notes = unknown_fields(config, known=[*SIZES, *OTHERS, *ONLY, *WINDOW, *own], prefix=prefix)
    return [*other, *_window_problems(config, prefix), *found], notes


def without_other_forms(given: Given, found: Iterable[str], *, allowed: Iterable[str] = ()) -> tuple[Given, list[str]]:
    """Return (the folder without tensors of unsupported forms, a problem for each form).

    Args:
        found: Problems of the fields; a form that they name already gets no second line.
        allowed: Forms that are supported.
    """
    found, problems, allowed = list(found), [], set(allowed)
    for effect, pattern in FORMS.items():
        if effect in allowed:
            continue
        names = [name for name in given.tensors if pattern.search(name)]
        if names and not any(line.endswith(effect) for line in found):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{given.files[names[0]]}: {names[0]}{more}: {effect}")
        given = without(given, names)
    return given, problems


def unknown_fields(config: Mapping[str, Any], *, known: Iterable[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Return (problems, notes) of unknown fields.

    A likely misspelling of a missing field is a problem. Others are only reported as not read.
    """
    known = list(known)
    found, unread = [], []
    for key in config:
        if key in known or key in SILENT:
            continue
        near = difflib.get_close_matches(key, [name for name in known if name not in config], n=1, cutoff=TYPO)
        if near and config[key] is not None:
            found.append(f"config.json: {prefix}{key} is {shown(config[key])}: unknown field. Did you mean {near[0]}?")
        else:
            unread.append(f"{prefix}{key}")
    return found, [f"config.json: unknown fields, not read: {listed(unread)}"] if unread else []


def _window_problems(config: Mapping[str, Any], prefix: str) -> list[str]:
    """Return that the layer attends to a part of the text only, if it does.

    If `layer_types` is there, its first entry decides. Without it, loaders of Llama's layer ignore the window, but a folder with
    use_sliding_window is refused, unless max_window_layers starts the window at a later layer.
    """
    kinds, window, used, first = (config.get(key) for key in WINDOW)
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        return [f"config.json: {prefix}layer_types must be a list of names, got {shown(kinds)}"]
    if kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        return [f"config.json: {prefix}layer_types is {shown(kinds)}: the layer would have another kind of attention"]
    later = _is_size(first)
    slides = kinds[0] == "sliding_attention" if kinds else bool(used) and not later
    if not slides or window is None:
        return []
    positions = config.get("max_position_embeddings")
    if _is_size(window) and _is_size(positions) and window >= positions:
        return []
    by = "layer_types" if kinds else "use_sliding_window"
    return [
        f"config.json: {prefix}sliding_window is {shown(window)}, and {by} enables it: the layer would attend to the "
        "last tokens only"
    ]


def layer_fields(config: Mapping[str, Any], target: TargetFiles) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (the fields of one layer under drafttrain's names, problems, notes); no fields if a size is missing or wrong."""
    found = size_problems(config, SIZES, may_lack=("num_key_value_heads", "head_dim"))
    if found:
        return {}, [*found, f"{TENSORS_UNSEEN}: their shapes follow from these fields"], []
    found += target_problems(config, target)
    rope, wrong, notes = _rope(config)
    found += wrong
    found += size_problems(config, ["max_position_embeddings"], may_lack=["max_position_embeddings"])
    eps, positions = config.get("rms_norm_eps"), config.get("max_position_embeddings")
    if eps is not None and not _is_positive(eps):
        found.append(f"config.json: rms_norm_eps must be a number above 0, got {shown(eps)}")
    if positions is None:
        positions = target.num_positions or UNLIMITED_POSITIONS
        notes.append(f"config.json: max_position_embeddings is missing: set to {positions}, the target's")
    if eps is None:
        notes.append(f"config.json: rms_norm_eps is missing: set to {DEFAULT_EPS}, Llama's default")
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
        max_position_embeddings=positions if _is_size(positions) else UNLIMITED_POSITIONS,
        rope=rope,
    )
    fields["vocab_size"] = config["vocab_size"]
    return fields, found or _rotation_problems(fields), notes


def size_problems(config: Mapping[str, Any], keys: Iterable[str], *, may_lack: Iterable[str] = ()) -> list[str]:
    """Return a line for every key that is not a whole number of 1 or more."""
    return [
        f"config.json: {key} must be a whole number of 1 or more, {f'got {shown(config[key])}' if key in config else 'it is missing'}"
        for key in keys
        if not (_is_size(config.get(key)) or (key in may_lack and config.get(key) is None))
    ]


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max


def target_problems(sizes: Mapping[str, Any], target: TargetFiles) -> list[str]:
    """Return sizes of features and tokens that differ from the target's."""
    return [
        f"config.json: {key} is {sizes[key]}, the target {target.name} has {target.size(key)}: "
        "it was made for another target: give that one as --target"
        for key in ("hidden_size", "vocab_size")
        if isinstance(sizes.get(key), int) and sizes[key] != target.size(key)
    ]


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (the rotation of positions, problems, notes), from rope_parameters or from the two fields before transformers 5."""
    new, theta, scaling = (config.get(key) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
    plain = {"rope_type": "default", "rope_theta": DEFAULT_THETA}
    wrong = [
        f"config.json: {key} must be a mapping or null, got {shown(value)}"
        for key, value in (("rope_parameters", new), ("rope_scaling", scaling))
        if value is not None and not isinstance(value, Mapping)
    ]
    if wrong:
        return plain, wrong, []
    if new is not None and isinstance(new.get("full_attention"), Mapping):
        # One a kind of layer, as transformers 5 has them; ours attends to the whole text.
        new = new["full_attention"]
    given = dict(new if new is not None else scaling or {})
    kind = given.pop("type", None)
    rope = {"rope_type": kind or "default"} | {key: value for key, value in given.items() if key in OF_ROPE}
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    rope.setdefault("rope_theta", theta if theta is not None else DEFAULT_THETA)
    missing = theta is None and "rope_theta" not in given
    notes = [f"config.json: rope_theta is missing: set to {DEFAULT_THETA:g}, Llama's default"] if missing else []
    if any(key in MROPE for key in given) or kind == "mrope":
        notes.append("config.json: positions of images along three axes (mrope): dropped, drafters read text")
    if unread := [key for key in given if key not in (*OF_ROPE, *ROPE_ONLY, *MROPE)]:
        notes.append(f"config.json: unknown fields, not read: {listed([f'rope_parameters.{key}' for key in unread])}")
    found = rope_problems({**config, "rope_parameters": new})
    found += [
        f"config.json: rope_parameters.{key} is {shown(given[key])}: the positions would be scaled differently"
        for key, allowed in ROPE_ONLY.items()
        if rope["rope_type"] != "default" and given.get(key) is not None and given[key] not in allowed
    ]
    trained = config.get("original_max_position_embeddings")
    if rope["rope_type"] != "default" and trained is not None:
        inside = rope.setdefault("original_max_position_embeddings", trained)
        if inside != trained:
            found.append(
                f"config.json: original_max_position_embeddings is {trained}, in rope_parameters it is {inside}: "
                "loaders read one or the other"
            )
    allowed = ("default", *ROPE_SCALINGS)
    if not _is_positive(rope["rope_theta"]):
        found.append(f"config.json: rope_theta must be a number above 0, got {shown(rope['rope_theta'])}")
    elif rope["rope_type"] not in allowed:
        found.append(f"config.json: rope_type is {shown(rope['rope_type'])}, allowed: {', '.join(allowed)}")
    elif rope.get("partial_rotary_factor", 1) != 1:
        found.append(
            f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, must be 1: only part of each head would be rotated"
        )
    return (plain if found else rope), found, notes


def _rotation_problems(fields: dict[str, Any]) -> list[str]:
    """Return why the rotation of positions cannot be computed, such as a missing number of its scaling."""
    kind = fields["rope_parameters"]["rope_type"]
    if fields["head_dim"] % 2:
        return [f"config.json: head_dim must be even, got {fields['head_dim']}: positions rotate pairs of coordinates"]
    try:
        frequencies = Rotary(llama_config(fields)).frequencies
    except Exception as error:  # transformers checks the fields of each scaling in its own way
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [f"config.json: the positions cannot be scaled by rope_type {kind!r}: {message}"]
    if not bool((frequencies.isfinite() & (frequencies > 0)).all()):
        return [f"config.json: the positions cannot be scaled by rope_type {kind!r}: a frequency is not above 0"]
    return []
