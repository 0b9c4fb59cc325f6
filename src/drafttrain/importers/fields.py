"""config.json of somebody else's one-layer drafter: what each field may say, what a field left out means, and none that is unknown."""

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
"""Fields that have no effect on what the layer computes, and are common enough that it need not be reported.

`model_type` has one in the speculators format alone: elsewhere the architecture says that the layer is Llama's.
"""

WINDOW = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
"""Fields that together say whether the layer attends to the whole text."""

FURTHER = "further layers are not read"
ATTENTION_BIAS = "the attention's projections would have biases"
MLP_BIAS = "the feed-forward block would have biases"
HEAD_NORMS = "queries and keys would be normed in each head, as Qwen3's are"
FORMS = {
    FURTHER: re.compile(r"^layers\.[1-9]\d*\.|^additional_layers\."),
    ATTENTION_BIAS: re.compile(r"self_attn\.\w+\.bias$"),
    MLP_BIAS: re.compile(r"mlp\.\w+\.bias$"),
    HEAD_NORMS: re.compile(r"self_attn\.[qk]_norm\."),
    "the feed-forward block would be a mixture of experts": re.compile(r"mlp\.(experts|gate|shared_experts?)\."),
}
"""Forms of the layer that are not read here, and the tensors that only they have."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_hidden_layers": ((1,), FURTHER),
    "hidden_act": (("silu",), "the layer's activation would be another one"),
    "attention_bias": ((False,), ATTENTION_BIAS),
    "bias": ((False,), "engines take it for biases of the attention and of fc"),
    "mlp_bias": ((False,), MLP_BIAS),
    "qkv_bias": ((False,), ATTENTION_BIAS),
    "partial_rotary_factor": ((1,), "only a part of each head would be rotated"),
    "rope_is_neox_style": ((True,), "other pairs of coordinates would be rotated"),
    "is_causal": ((True,), "the attention would look ahead"),
    "logit_scale": ((1,), "the drafter's logits would be scaled"),
    "use_aux_norm": ((False,), "it is SGLang's older name of fc_norm: write that"),
    "num_aux_hidden_states": ((3,), "another number of the target's states would be read"),
    "quantization_config": (({},), "quantized weights are not read"),
    "compression_config": (({},), "quantized weights are not read"),
}
"""Fields that have an effect: what of them is read, and what another value would do; null is the same as left out."""

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
"""Fields of rope_parameters, or of rope_scaling."""

ROPE_ONLY: dict[str, tuple[Any, ...]] = {
    "alpha": (),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
    "apply_yarn_scaling": (True,),
    "use_fope": (False,),
}
"""Fields of a scaling that vLLM 0.32.0 reads beside these, and the values that have no effect."""

MROPE = ("mrope_section", "mrope_interleaved")
"""How the positions of images are turned along three axes; in text all three are the same."""

DEFAULT_THETA, DEFAULT_EPS = 10000.0, 1e-6
"""What LlamaConfig takes where a file is silent."""

TYPO = 0.85
"""Likeness from which an unknown field is taken for a known one that is missing."""

TENSORS_UNSEEN = "the tensors were not looked at"


def layer_problems(config: Mapping[str, Any], *, own: Iterable[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Return (problems, notes): a field whose value has an effect that our layer has not is a problem, an unknown one a note.

    Args:
        own: Fields of the drafter's kind beside those of its layer.
        prefix: Where in config.json.
    """
    own = tuple(own)
    other = [
        f"config.json: {prefix}{key} is {shown(config[key])}, only {' or '.join(map(repr, (*allowed, None)))} is read here: {effect}"
        for key, (allowed, effect) in ONLY.items()
        if key not in own and config.get(key) is not None and config[key] not in allowed
    ]
    found, notes = unknown_fields(config, known=[*SIZES, *OTHERS, *ONLY, *WINDOW, *own], prefix=prefix)
    return [*other, *_window_problems(config, prefix), *found], notes


def without_other_forms(given: Given, found: Iterable[str]) -> tuple[Given, list[str]]:
    """Return (the folder without the tensors of layers of other forms, one problem a form).

    Args:
        found: Problems of the fields: a form that one of them names already needs no second line.
    """
    found, problems = list(found), []
    for effect, pattern in FORMS.items():
        names = [name for name in given.tensors if pattern.search(name)]
        if names and not any(line.endswith(effect) for line in found):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{given.files[names[0]]}: {names[0]}{more}: {effect}")
        given = without(given, names)
    return given, problems


def unknown_fields(config: Mapping[str, Any], *, known: Iterable[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Return (problems, notes) of the fields that are not known here.

    One that looks like a known field that is missing is a problem. Others are no reason to refuse: they are reported as not read.
    """
    known = list(known)
    found, unread = [], []
    for key in config:
        if key in known or key in SILENT:
            continue
        near = difflib.get_close_matches(key, [name for name in known if name not in config], n=1, cutoff=TYPO)
        if near and config[key] is not None:
            found.append(f"config.json: {prefix}{key} is {shown(config[key])}: unknown field, is it {near[0]}?")
        else:
            unread.append(f"{prefix}{key}")
    return found, [f"config.json: not read, unknown here: {listed(unread)}"] if unread else []


def _window_problems(config: Mapping[str, Any], prefix: str) -> list[str]:
    """Return that the layer attends to a part of the text, if it does.

    `layer_types` decides where it is given, its first entry being the drafter's layer. Without it, loaders of Llama's layer read no
    window; one that the file says it uses is not passed over, unless max_window_layers says that it begins at a later layer.
    """
    kinds, window, used, first = (config.get(key) for key in WINDOW)
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        return [f"config.json: {prefix}layer_types must be a list of names, got {shown(kinds)}"]
    if kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        return [f"config.json: {prefix}layer_types is {shown(kinds)}: the layer's attention would be of another kind"]
    later = _is_size(first)
    slides = kinds[0] == "sliding_attention" if kinds else bool(used) and not later
    if not slides or window is None:
        return []
    positions = config.get("max_position_embeddings")
    if _is_size(window) and _is_size(positions) and window >= positions:
        return []
    by = "layer_types" if kinds else "use_sliding_window"
    return [
        f"config.json: {prefix}sliding_window is {shown(window)}, and {by} says that it is used: the layer would attend to so many "
        "tokens alone"
    ]


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
        found.append(f"config.json: rms_norm_eps must be a number above 0, got {shown(eps)}")
    if positions is None:
        positions = target.num_positions or UNLIMITED_POSITIONS
        notes.append(f"config.json: max_position_embeddings is left out: taken as {positions}, the target's")
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
        max_position_embeddings=positions if _is_size(positions) else UNLIMITED_POSITIONS,
        rope=rope,
    )
    fields["vocab_size"] = config["vocab_size"]
    return fields, found or _angle_problems(fields), notes


def size_problems(config: Mapping[str, Any], keys: Iterable[str], *, may_lack: Iterable[str] = ()) -> list[str]:
    """Return one line for every key that is no whole number of 1 or more."""
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
    silent = theta is None and "rope_theta" not in given
    notes = (
        [f"config.json: rope_theta is left out: taken as {DEFAULT_THETA:g}, as Llama's loaders do"] if silent else []
    )
    if any(key in MROPE for key in given) or kind == "mrope":
        notes.append("config.json: positions of images along three axes (mrope): left out, drafters here read text")
    if unread := [key for key in given if key not in (*OF_ROPE, *ROPE_ONLY, *MROPE)]:
        notes.append(f"config.json: not read, unknown here: {listed([f'rope_parameters.{key}' for key in unread])}")
    found = rope_problems({**config, "rope_parameters": new})
    found += [
        f"config.json: rope_parameters.{key} is {shown(given[key])}: the positions would be scaled in another way"
        for key, allowed in ROPE_ONLY.items()
        if rope["rope_type"] != "default" and given.get(key) is not None and given[key] not in allowed
    ]
    trained = config.get("original_max_position_embeddings")
    if rope["rope_type"] != "default" and trained is not None:
        inside = rope.setdefault("original_max_position_embeddings", trained)
        if inside != trained:
            found.append(
                f"config.json: original_max_position_embeddings is {trained}, in rope_parameters it is {inside}: "
                "readers take the one or the other"
            )
    allowed = ("default", *ROPE_SCALINGS)
    if not _is_positive(rope["rope_theta"]):
        found.append(f"config.json: rope_theta must be a number above 0, got {shown(rope['rope_theta'])}")
    elif rope["rope_type"] not in allowed:
        found.append(f"config.json: rope_type is {shown(rope['rope_type'])}, allowed: {', '.join(allowed)}")
    elif rope.get("partial_rotary_factor", 1) != 1:
        found.append(
            f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, only 1 is read here: only a part of each head would be rotated"
        )
    return (plain if found else rope), found, notes


def _angle_problems(fields: dict[str, Any]) -> list[str]:
    """Return why the angles of positions cannot be computed: a scaling that lacks a number."""
    kind = fields["rope_parameters"]["rope_type"]
    if fields["head_dim"] % 2:
        return [f"config.json: head_dim must be even, got {fields['head_dim']}: positions turn pairs of coordinates"]
    try:
        frequencies = Rotary(llama_config(fields)).frequencies
    except Exception as error:  # transformers checks the fields of each scaling in its own way
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [f"config.json: the positions cannot be scaled as rope_type {kind!r} says: {said}"]
    if not bool((frequencies.isfinite() & (frequencies > 0)).all()):
        return [f"config.json: the positions cannot be scaled as rope_type {kind!r} says: a frequency is not above 0"]
    return []
