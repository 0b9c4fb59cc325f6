"""EAGLE-3 as SafeAILab, SpecForge and ModelOpt write it: one layer under `midlayer.` or `layers.0.`, ids mapped by d2t and t2d.

V = the target's vocabulary, R = the drafter's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from drafttrain.checkpoint import ABOUT
from drafttrain.core.errors import CheckpointError
from drafttrain.core.printable import shown
from drafttrain.drafters.draft_vocabulary import vocabulary_problems
from drafttrain.drafters.eagle import eagle3
from drafttrain.drafters.eagle.eagle3 import NUM_TAPS, Eagle3Settings, taps_of
from drafttrain.environments.known import VLLM_RELEASE as VLLM
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.export.sglang import READ_IN as SGLANG
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.fields import (
    FURTHER,
    layer_fields,
    layer_problems,
    size_problems,
    unknown_fields,
    without_other_forms,
)
from drafttrain.importers.naming import renamed, unwrapped
from drafttrain.importers.target import TargetFiles

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
OURS, THEIRS = "midlayer.", "layers.0."
TAPS, NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"
VARIANTS = ("norm_before_fc", "fc_norm", "norm_output", "norm_before_residual")
OWN = ("draft_vocab_size", "target_hidden_size", "tie_word_embeddings", TAPS, NUM_TAPS, NESTED, *VARIANTS)
NESTED_ONLY: dict[str, bool | int] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}
"""Fields of ModelOpt's exports, and the one value that drafttrain's layer supports; null or a missing field means this value."""

OF_NESTED = (TAPS, "norm_before_fc", *NESTED_ONLY, "next_layer_regular", "parallel_draft_heads_num_layers")
"""The last two concern further layers and parallel drafting only."""

HEAD = "lm_head.weight"


@dataclass
class Eagle3Layout:
    """EAGLE-3, official."""


@importers.register("eagle3", Eagle3Layout)
class Eagle3Importer(Importer):
    """The names of formats that vLLM, SGLang and TensorRT-LLM read.

    Tap i on the first level of config.json is the state entering block i, as in drafttrain; in `eagle_config` (ModelOpt, SpecForge,
    SGLang) it is the block whose output is read, one less. d2t holds offsets, target id - draft id; some files hold target ids instead.

    Source: Li et al. 2025, EAGLE-3, arXiv 2503.01840.
    """

    holds: ClassVar[str] = "eagle3"
    fields: ClassVar[tuple[str, ...]] = OWN
    known_by: ClassVar[str] = (
        f"architectures {' or '.join(ARCHITECTURES)}, or tensors midlayer.* or layers.0.hidden_norm"
    )

    def recognises(self, given: Given) -> bool:
        """Return whether the architecture or the names of the tensors are EAGLE-3's."""
        named, names = given.architectures & set(ARCHITECTURES), unwrapped(given).tensors
        return bool(named) or any(n.startswith(OURS) or n == f"{THEIRS}hidden_norm.weight" for n in names)

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout has no field for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        nested = given.config.get(NESTED) or {}
        if not isinstance(nested, Mapping):
            problem = f"config.json: {NESTED} must be a mapping, got {nested!r}"
            return Imported(DrafterFiles(self.holds, {}, {}), [problem])
        given = unwrapped(given)
        found, unread = layer_problems(given.config, own=self.fields)
        wrong, more = unknown_fields(nested, known=OF_NESTED, prefix=f"{NESTED}.")
        found, unread = [*found, *wrong], [*unread, *more]
        found += [
            f"config.json: {NESTED}.{key} is {nested[key]!r}, must be {value!r}: the layer would be another one"
            for key, value in NESTED_ONLY.items()
            if nested.get(key) not in (None, value)
        ]
        given, others = without_other_forms(given, found, allowed=(FURTHER,) if self.holds == "p_eagle" else ())
        found += others
        taps, wrong, notes = taps_read(given.config, target)
        # For vLLM and SGLang the nested field has precedence.
        config = {**given.config}
        if "norm_before_fc" in nested:
            config["norm_before_fc"] = nested["norm_before_fc"]
        made = self.files(replace(given, config=config), target, taps=taps)
        notes += self.norm_output_notes(given)
        return Imported(made.files, [*found, *wrong, *made.problems], [*unread, *notes, *made.notes])

    def files(self, given: Given, target: TargetFiles, *, taps: list[int]) -> Imported:
        """Return the files of a drafter with these taps, from a configuration of one level."""
        return eagle3_files(given, target, taps=taps)

    def norm_output_notes(self, given: Given) -> list[str]:
        """Return what the field `norm_output` means."""
        return _norm_output_notes(given)


def _norm_output_notes(given: Given) -> list[str]:
    """Return how engines read `norm_output` and how SpecForge does, unless drafttrain exported the folder."""
    value = given.config.get("norm_output")
    if not isinstance(value, bool) or (given.folder / ABOUT).exists():
        return []
    if value:
        engines, specforge, then = (
            "after",
            "the head reads a normed state, as in every drafttrain drafter",
            "write false",
        )
    else:
        engines, specforge, then = (
            "before",
            "the head reads a state without a norm",
            "no engine computes this drafter",
        )
    return [
        f"config.json: norm_output is {str(value).lower()}: the state is fed back {engines} the final norm, as in vLLM {VLLM} and SGLang "
        f"{SGLANG}. In SpecForge 0.2.0 it means that {specforge}, and the state is always fed back before the norm. If "
        f"SpecForge trained this drafter, {then}"
    ]


def eagle3_files(given: Given, target: TargetFiles, *, taps: list[int]) -> Imported:
    """Return the files of a drafter with these taps, from a configuration of one level."""
    length = draft_length(given.config)
    settings = Eagle3Settings() if length is None else Eagle3Settings(num_steps=length)
    own = {"drafttrain": {name: getattr(settings, name) for name in eagle3.OWN}}
    given, wrong, dropped = without_copies(given, {"embed_tokens.weight": target.embedding}, target)
    made = files_of("eagle3", given, target, taps=taps, own=own)
    return replace(made, problems=[*made.problems, *wrong], notes=[*made.notes, *dropped])


def files_of(kind: str, given: Given, target: TargetFiles, *, taps: list[int], own: Mapping[str, Any]) -> Imported:
    """Return the files of EAGLE-3 or of its parallel form, whose embedding is the target's unless they have one.

    Args:
        own: Fields of the kind that differ from EAGLE-3's.
    """
    fields, found, notes = layer_fields(given.config, target)
    if not fields:
        return Imported(DrafterFiles(kind, {}, {}), found, notes)
    config = {
        "architectures": [ARCHITECTURES[0]],
        **fields,
        **_own_fields(given, found),
        TAPS: taps,
        NUM_TAPS: len(taps),
        **own,
    }
    if given.config.get(NUM_TAPS) not in (None, len(taps)):
        found.append(
            f"config.json: {NUM_TAPS} is {shown(given.config[NUM_TAPS])}, but the states of {len(taps)} blocks are read: {taps}"
        )
    given, angles = without_angles(given, fields)
    given, mapped, more = with_map(given, config)
    of_first = [name for name in given.tensors if name.startswith((OURS, THEIRS))]
    prefix = THEIRS if sum(name.startswith(THEIRS) for name in of_first) > len(of_first) / 2 else OURS
    tensors, named = renamed(
        given, LAYOUTS[kind][0](config), ours=prefixed(THEIRS, OURS), theirs=prefixed(OURS, prefix)
    )
    files = DrafterFiles(kind, config, tensors)
    return Imported(files, [*found, *angles, *mapped, *named], [*notes, *more])


def prefixed(old: str, new: str) -> Callable[[str], str]:
    """Return a function that replaces one prefix by another."""
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


def taps_read(config: Mapping[str, Any], target: TargetFiles) -> tuple[list[int], list[str], list[str]]:
    """Return (taps as blocks whose incoming states are read, problems, notes)."""
    inner = config.get(NESTED)
    first, nested = config.get(TAPS), inner.get(TAPS) if isinstance(inner, Mapping) else None
    num_layers = target.size("num_hidden_layers")
    fallback = [2, num_layers // 2, num_layers - 3]
    for key, given in ((TAPS, first), (f"{NESTED}.{TAPS}", nested)):
        if given is not None and not (isinstance(given, list) and all(type(tap) is int for tap in given)):
            return fallback, [f"config.json: {key} must be a list of whole numbers, got {given!r}"], []
    if first and nested and first != [tap + 1 for tap in nested]:
        problem = f"config.json: {TAPS} is {first}, {NESTED}.{TAPS} {nested}: each tap in the second must be one less, because it counts outputs"
        return first, [problem], []
    notes = []
    if first:
        taps, key = first, TAPS
    elif nested:
        taps, key = [tap + 1 for tap in nested], f"{NESTED}.{TAPS}"
        notes = [
            f"taps {nested} of {NESTED} are blocks whose output is read; they become {taps}, the blocks that the states enter"
        ]
    else:
        taps, key = fallback, f"{TAPS} (missing)"
        notes = [f"config.json: {TAPS} is missing: set to {taps}, as in EAGLE-3"]
    try:
        return taps_of(num_layers, taps), [], notes
    except CheckpointError:
        return (
            taps,
            [
                f"config.json: {key}: taps {taps}, as states entering blocks, must be one or more different numbers of "
                f"0..{num_layers - 1} in rising order for the target {target.name}"
            ],
            notes,
        )


def _own_fields(given: Given, found: list[str]) -> dict[str, Any]:
    """Return the fields of the kind; problems are added to `found`.

    A configuration that was made from a target's may have tie_word_embeddings although the file has a head: loaders read the head.
    """
    config = given.config
    for key in (*VARIANTS, "tie_word_embeddings"):
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            found.append(f"config.json: {key} must be true or false, got {value!r}")
    if config.get("tie_word_embeddings") is True and HEAD not in given.tensors:
        found.append(
            f"config.json: tie_word_embeddings is true, but there is no {HEAD}: a drafter of this layout has its own head"
        )
    width, rows = config["hidden_size"], config.get("draft_vocab_size")
    found += size_problems(config, ["draft_vocab_size"], may_lack=["draft_vocab_size"])
    if config.get("target_hidden_size") not in (None, width):
        found.append(
            f"config.json: target_hidden_size is {config['target_hidden_size']}, must be hidden_size ({width})"
        )
    return {
        "draft_vocab_size": rows if isinstance(rows, int) else config["vocab_size"],
        "target_hidden_size": width,
        **{key: config.get(key) is True for key in VARIANTS},
    }


def draft_length(config: Mapping[str, Any]) -> int | None:
    """Return the draft length in a speculators folder; None: it has none."""
    try:
        length = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None
    return length if type(length) is int and length >= 1 else None


def with_map(given: Given, config: Mapping[str, Any]) -> tuple[Given, list[str], list[str]]:
    """Return (the folder with d2t as offsets and t2d as booleans, problems, notes)."""
    d2t_R, t2d_V = given.tensors.get("d2t"), given.tensors.get("t2d")
    rows, size = config["draft_vocab_size"], config["vocab_size"]
    if d2t_R is None:
        return given, [], []  # renamed() reports a missing d2t
    wrong = [
        f"{given.files[name]}: {name}: is {tensor.dtype}, must be {wanted}"
        for name, tensor, wanted in (("d2t", d2t_R, "int64"), ("t2d", t2d_V, "bool"))
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
    ]
    shaped = d2t_R.shape == (rows,) and (t2d_V is None or t2d_V.shape == (size,))
    if wrong or not shaped:
        return given, wrong, []
    rest = {name: tensor for name, tensor in given.tensors.items() if name not in ("d2t", "t2d")}
    offsets_R, wrong, notes = offsets(d2t_R.long(), t2d_V, size=size)
    if wrong:
        return given, [f"{given.files['d2t']}: {line}" for line in wrong], []
    if rows == size:
        if offsets_R.any():
            return (
                given,
                [f"{given.files['d2t']}: d2t: permutes the whole vocabulary of {size} tokens, which is not supported"],
                [],
            )
        return replace(given, tensors=rest), [], [*notes, "d2t, t2d: dropped, the vocabulary is the target's"]
    mask_V = torch.zeros(size, dtype=torch.bool)
    mask_V[offsets_R + torch.arange(rows)] = True
    if t2d_V is None:
        notes.append("t2d: missing, computed from d2t")
        given = replace(given, files={**given.files, "t2d": given.files["d2t"]})
    return replace(given, tensors={**rest, "d2t": offsets_R, "t2d": mask_V}), [], notes


def offsets(d2t_R: Tensor, t2d_V: Tensor | None, *, size: int) -> tuple[Tensor, list[str], list[str]]:
    """Return (target id - draft id of every token, problems, notes) of a d2t that holds these offsets or the target's ids.

    t2d decides which of the two it holds. Without t2d, only one of them may be possible.
    """
    own_R = torch.arange(len(d2t_R))
    if t2d_V is None:
        valid = {name: _is_map(ids_R, size) for name, ids_R in (("offsets", d2t_R + own_R), ("ids", d2t_R))}
        if all(valid.values()):
            return d2t_R, ["d2t: may hold offsets or ids, both are possible: add t2d, which decides"], []
        as_ids = valid["ids"]
        problems = (
            []
            if any(valid.values())
            else [f"d2t: both as offsets and as ids, it has ids that occur twice or are not in 0..{size - 1}"]
        )
    else:
        if not bool(((t2d_V == 0) | (t2d_V == 1)).all()):
            return d2t_R, ["t2d: must be true (or 1) for every id that the drafter can propose, else false (or 0)"], []
        problems = vocabulary_problems(d2t_R, t2d_V.bool())
        as_ids = bool(problems) and not vocabulary_problems(d2t_R - own_R, t2d_V.bool())
    if as_ids:
        return d2t_R - own_R, [], ["d2t: holds the target's ids; written as offsets, target id - draft id"]
    return d2t_R, problems, []


def _is_map(ids_R: Tensor, size: int) -> bool:
    """Return whether these are different ids of the target."""
    inside = bool(((ids_R >= 0) & (ids_R < size)).all())
    return inside and len(ids_R.unique()) == len(ids_R)
