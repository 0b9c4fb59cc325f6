"""The format of the speculators library: several kinds with a config.json of two levels, which names the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drafttrain.drafters.dflash.config import layer_ids
from drafttrain.drafters.dspark.dspark import FIELDS
from drafttrain.drafters.eagle.eagle3 import NUM_TAPS
from drafttrain.environments.known import VLLM_RELEASE as VLLM
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.speculators_kinds import VERSION
from drafttrain.importers import Claim, Given, Imported, Importer, importers
from drafttrain.importers.dflash import dflash_files
from drafttrain.importers.dspark import dspark_files
from drafttrain.importers.eagle3 import eagle3_files, taps_read
from drafttrain.importers.fields import FURTHER, HEAD_NORMS, layer_problems, unknown_fields, without_other_forms
from drafttrain.importers.naming import unwrapped
from drafttrain.importers.p_eagle import OWN as P_EAGLE_OWN
from drafttrain.importers.p_eagle import p_eagle_files
from drafttrain.importers.target import TargetFiles
from drafttrain.importers.unsupported import READ

LAYER = "transformer_layer_config"
FIRST_LEVEL = (
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    LAYER,
    *(key for key in P_EAGLE_OWN if key != "eagle_config"),
    *("aux_hidden_state_layer_ids", "block_size", "sample_from_anchor", "sliding_window_non_causal"),
    *FIELDS.values(),
    # Fields of the library, of Hugging Face, and of its training; a trained embedding is recognised by its values.
    *("has_no_defaults_at_init", "embed_requires_grad", "enable_sp_ulysses"),
)


@dataclass
class SpeculatorsLayout:
    """EAGLE-3, P-EAGLE, DFlash and DSpark of the speculators library."""


@importers.register("speculators", SpeculatorsLayout)
class SpeculatorsImporter(Importer):
    """The tensors of EAGLE-3 under `layers.0.`. Tap i is the state entering block i."""

    holds: ClassVar[str] = "eagle3"
    claim = Claim.FORMAT
    known_by: ClassVar[str] = "speculators_model_type in config.json"

    def recognises(self, given: Given) -> bool:
        """Return whether config.json has the field that all such folders have."""
        return "speculators_model_type" in given.config

    def target_of(self, given: Given) -> str | None:
        """Return the verifier, which is the library's name for the target."""
        try:
            name = given.config["speculators_config"]["verifier"]["name_or_path"]
        except (KeyError, TypeError):
            return None
        return name if isinstance(name, str) and name else None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        kind, layer = given.config["speculators_model_type"], given.config.get(LAYER)
        given = unwrapped(given)
        found, notes = unknown_fields(given.config, known=FIRST_LEVEL)
        if kind not in READ:
            found.append(f"config.json: speculators_model_type is {kind!r}, must be one of {', '.join(READ)}")
        if not isinstance(layer, Mapping):
            found.append(f"config.json: {LAYER} must be a mapping, got {layer!r}")
        if kind not in READ or not isinstance(layer, Mapping):
            return Imported(DrafterFiles("eagle3", {}, {}), found)
        # This field describes the verifier; the drafter's own is on the first level.
        layer = {key: value for key, value in layer.items() if key != "tie_word_embeddings"}
        files_of = _block if kind in BLOCKS else _eagle3
        made = files_of(given, layer, target)
        return Imported(made.files, [*found, *made.problems], [*notes, *made.notes])


def _flat(given: Given, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of both levels on one."""
    return {**layer, **{key: given.config[key] for key in FIRST_LEVEL if key in given.config}}


def _eagle3(given: Given, layer: Mapping[str, Any], target: TargetFiles) -> Imported:
    """Return the files of EAGLE-3 or P-EAGLE."""
    parallel = given.config["speculators_model_type"] == "peagle"
    found, notes = layer_problems(
        layer, own=(NUM_TAPS, *(["num_hidden_layers"] if parallel else [])), prefix=f"{LAYER}."
    )
    if layer.get("model_type") not in (None, "llama"):
        effect = HEAD_NORMS if layer["model_type"] == "qwen3" else "the layer would be that model's"
        found.append(f"config.json: {LAYER}.model_type is {layer['model_type']!r}, must be 'llama': {effect}")
    given, others = without_other_forms(given, found, allowed=(FURTHER,) if parallel else ())
    flat = _flat(given, layer)
    if flat.get("norm_before_residual") is None:
        flat["norm_before_residual"] = not parallel
        if not parallel:
            notes.append(
                f"config.json: norm_before_residual is missing: set to true, as vLLM {VLLM} does in this format; "
                f"speculators {VERSION} assumes false"
            )
    taps, wrong, more = taps_read(flat, target)
    files = p_eagle_files if parallel else eagle3_files
    made = files(replace(given, config=flat), target, taps=taps)
    return Imported(made.files, [*found, *others, *wrong, *made.problems], [*notes, *more, *made.notes])


def _block(given: Given, layer: Mapping[str, Any], target: TargetFiles) -> Imported:
    """Return the files of DFlash or DSpark.

    sliding_window_non_causal concerns sliding layers, of which there are none, but vLLM 0.32.0 runs every layer causally if it is
    false (vllm#56692); the library trained these layers with attention to the whole block.
    """
    found, notes = layer_problems(layer, own=("num_hidden_layers",), prefix=f"{LAYER}.")
    if layer.get("model_type") != "qwen3":
        found.append(f"config.json: {LAYER}.model_type is {layer.get('model_type')!r}, must be 'qwen3'")
    taps = given.config.get("aux_hidden_state_layer_ids")
    if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
        found.append(f"config.json: aux_hidden_state_layer_ids must be a list of whole numbers, got {taps!r}")
        return Imported(DrafterFiles(given.config["speculators_model_type"], {}, {}), found, notes)
    if given.config.get("sliding_window_non_causal") is False:
        notes.append(
            f"config.json: sliding_window_non_causal is false: dropped, no layer slides; vLLM {VLLM} makes these layers causal for it, "
            "and drafts worse than they were trained to"
        )
    nested = {"mask_token_id": given.config.get("mask_token_id"), "target_layer_ids": layer_ids(taps), "causal": False}
    files_of, assumed = BLOCKS[given.config["speculators_model_type"]]
    flat = {**_flat(given, layer), "dflash_config": nested}
    for key, value in assumed.items():
        if flat.get(key) is None:
            flat[key] = value
            notes.append(f"config.json: {key} is missing: set to {value!r}, as speculators {VERSION} does")
    made = files_of(replace(given, config=flat), target)
    return Imported(made.files, [*found, *made.problems], [*notes, *made.notes])


BLOCKS: Mapping[str, tuple[Callable[[Given, TargetFiles], Imported], Mapping[str, Any]]] = {
    "dflash": (dflash_files, {}),
    "dspark": (
        dspark_files,
        {
            "sample_from_anchor": True,
            "markov_rank": 256,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        },
    ),
}
"""By the format's name of a kind, what returns its files, and the library's values of missing fields."""
