"""EAGLE-1: one layer without an input norm over (embedding, feature), with the target's head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from drafttrain.drafters.eagle.eagle1 import FC_BIAS, own_defaults
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.export.target_logits import scale_of
from drafttrain.importers import Claim, Given, Imported, Importer, importers
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.fields import layer_fields, layer_problems, unknown_fields, without_other_forms
from drafttrain.importers.naming import renamed, unwrapped, without
from drafttrain.importers.target import TargetFiles

ARCHITECTURES = ("EagleLlamaForCausalLM", "LlamaForCausalLMEagle", "EAGLEModel")
WRAPPER = ("model", "model_type", "truncated_vocab_size", FC_BIAS, "method", "num_lookahead_tokens")
"""Fields of the first level if `model` holds those of the layer."""

BIAS = "fc.bias"


@dataclass
class EagleLayout:
    """EAGLE-1."""


@importers.register("eagle", EagleLayout)
class EagleImporter(Importer):
    """The authors' names; the head and the embedding are the target's. fc may have a bias, which is the authors' default.

    Source: Li et al. 2024, EAGLE, arXiv 2401.15077.
    """

    holds: ClassVar[str] = "eagle"
    claim = Claim.PART
    known_by: ClassVar[str] = f"architectures {' or '.join(ARCHITECTURES)}, model_type eagle, or a tensor fc.weight"

    def recognises(self, given: Given) -> bool:
        """Return whether the architecture is EAGLE's, or there is an fc."""
        named = given.architectures & set(ARCHITECTURES)
        return bool(named) or given.config.get("model_type") == "eagle" or "fc.weight" in unwrapped(given).tensors

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout has no field for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        given = unwrapped(given)
        config, found, notes = _flat(given.config)
        if config.get("logit_scale") == scale_of(target.config):
            # The drafter reads the target's head, which applies this scale.
            found = [line for line in found if "logit_scale" not in line]
        given, others = without_other_forms(given, found)
        found += others
        fields, wrong, more = layer_fields(config, target)
        found, notes = [*found, *wrong], [*notes, *more]
        if not fields:
            return Imported(DrafterFiles("eagle", {}, {}), found, notes)
        own = own_defaults()
        config = {"architectures": ["LlamaForCausalLM"], **fields, "drafttrain": own}
        shared = {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head}
        given, wrong, more = without_copies(given, shared, target)
        given, angles = without_angles(given, fields)
        if BIAS in given.tensors and not given.tensors[BIAS].any():
            given, more = without(given, [BIAS]), [*more, f"{BIAS}: dropped, it is zero"]
        elif BIAS in given.tensors:
            config[FC_BIAS] = True
        tensors, named = renamed(given, LAYOUTS["eagle"][0](config), ours=str, theirs=str)
        files = DrafterFiles("eagle", config, tensors)
        return Imported(files, [*found, *wrong, *angles, *named], [*notes, *more])


def _flat(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (the layer's fields, problems, notes) of a configuration with or without vLLM's wrapper."""
    inner = config.get("model")
    if inner is None:
        own = ("bias", "tie_word_embeddings", "final_logit_softcapping", *WRAPPER[2:])
        found, notes = layer_problems(config, own=own)
        return dict(config), [*found, *_vocabulary_cut(config, config)], notes
    if not isinstance(inner, Mapping):
        return {}, [f"config.json: model must be a mapping, got {inner!r}"], []
    found, notes = unknown_fields(config, known=(*WRAPPER, "tie_word_embeddings", "vocab_size", "hidden_size"))
    wrong, more = layer_problems(inner, own=("bias", "tie_word_embeddings"), prefix="model.")
    return dict(inner), [*found, *wrong, *_vocabulary_cut(config, inner)], [*notes, *more]


def _vocabulary_cut(config: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    cut, whole = config.get("truncated_vocab_size"), layer.get("vocab_size")
    if cut in (None, whole):
        return []
    return [f"config.json: truncated_vocab_size is {cut}, must be null or vocab_size ({whole})"]
