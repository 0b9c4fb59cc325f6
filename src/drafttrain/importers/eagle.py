"""EAGLE-1: one layer without an input norm over (embedding, feature), read by the target's own head.

D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from drafttrain.drafters.eagle import EagleSettings
from drafttrain.export import DrafterFiles
from drafttrain.export.layout import LAYOUTS
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.copies import without_angles, without_copies
from drafttrain.importers.fields import layer_fields, layer_problems, unknown_problems
from drafttrain.importers.naming import renamed, without
from drafttrain.importers.target import TargetFiles

ARCHITECTURES = ("EagleLlamaForCausalLM", "LlamaForCausalLMEagle", "EAGLEModel")
WRAPPER = ("model", "model_type", "truncated_vocab_size", "eagle_fc_bias", "method", "num_lookahead_tokens")
"""Fields of the first level where `model` holds the layer's."""

BIAS = "fc.bias"
OWN_SETTINGS = ("num_steps", "step_decay", "feature_weight", "loss_weight", "feature_noise", "draft")


@dataclass
class EagleLayout:
    """EAGLE-1."""


@importers.register("eagle", EagleLayout)
class EagleImporter(Importer):
    """The authors' names; the head and the embedding are the target's, a bias of fc must be zero: vLLM drops it, ours has none.

    Source: Li et al. 2024, EAGLE, arXiv 2401.15077.
    """

    holds: ClassVar[str] = "eagle"
    known_by: ClassVar[str] = f"architectures {' or '.join(ARCHITECTURES)}, model_type eagle, or a tensor fc.weight"

    def recognises(self, given: Given) -> bool:
        """Tell by the architecture, or an fc that no other layout explains."""
        others = [importers.entry(name).component() for name in ("eagle3", "speculators", "medusa")]
        if any(other.recognises(given) for other in others):
            return False
        named = given.architectures & set(ARCHITECTURES)
        return bool(named) or given.config.get("model_type") == "eagle" or "fc.weight" in given.tensors

    def target_of(self, given: Given) -> str | None:
        """Return nothing: the layout has no place for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        config, found = _flat(given.config)
        fields, wrong, notes = layer_fields(config, target)
        found += wrong
        if not fields:
            return Imported(DrafterFiles("eagle", {}, {}), found, notes)
        settings = EagleSettings()
        own = {name: getattr(settings, name) for name in OWN_SETTINGS}
        config = {"architectures": ["LlamaForCausalLM"], **fields, "drafttrain": own}
        shared = {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head}
        given, wrong, said = without_copies(given, shared, target)
        given, turned = without_angles(given, fields)
        given, biased, more = _without_bias(given, width=fields["hidden_size"])
        tensors, named = renamed(given, LAYOUTS["eagle"][0](config), ours=str, theirs=str)
        files = DrafterFiles("eagle", config, tensors)
        return Imported(files, [*found, *wrong, *turned, *biased, *named], [*notes, *said, *more])


def _flat(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (the layer's fields, problems), of a configuration with or without vLLM's wrapper."""
    inner = config.get("model")
    if inner is None:
        own = ("bias", "tie_word_embeddings", *WRAPPER[2:])
        plain = {k: v for k, v in config.items() if (k, v) != ("model_type", "eagle")}
        return plain, [*layer_problems(plain, own=own), *_vocabulary_cut(config, config)]
    if not isinstance(inner, Mapping):
        return {}, [f"config.json: model must be a mapping, got {inner!r}"]
    found = unknown_problems(config, known=(*WRAPPER, "tie_word_embeddings", "vocab_size", "hidden_size"))
    found += layer_problems(inner, own=("bias", "tie_word_embeddings"), prefix="model.")
    return dict(inner), [*found, *_vocabulary_cut(config, inner)]


def _vocabulary_cut(config: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    cut, whole = config.get("truncated_vocab_size"), layer.get("vocab_size")
    if cut in (None, whole):
        return []
    return [f"config.json: truncated_vocab_size is {cut}, only null or vocab_size ({whole}) is read here"]


def _without_bias(given: Given, *, width: int) -> tuple[Given, list[str], list[str]]:
    """Return (the folder without a bias of zeros, problems, notes)."""
    bias_D = given.tensors.get(BIAS)
    if bias_D is None:
        return given, [], []
    where = f"{given.files[BIAS]}: {BIAS}"
    if tuple(bias_D.shape) != (width,):
        return without(given, [BIAS]), [f"{where}: shape {list(bias_D.shape)}, must be {[width]}, all zero"], []
    if bias_D.any():
        count = int((bias_D != 0).sum())
        said = f"{where}: {count} of {width} values are not zero: our fc has no bias, and vLLM drops it without a word"
        return without(given, [BIAS]), [said], []
    return without(given, [BIAS]), [], [f"{BIAS}: left out, it is zero"]
