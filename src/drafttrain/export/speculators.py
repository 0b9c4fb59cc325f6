"""Export in the `speculators` format: EAGLE-3 and P-EAGLE with the name and embedding of the target. `vllm serve FOLDER` serves them.

Written after the source of speculators 0.9.0, which loads it, and of vLLM 0.32.0, which reads the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.drafters.p_eagle.settings import OWN_EMBEDDING
from drafttrain.environments.known import VLLM_RELEASE
from drafttrain.export import FOLDER, Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems
from drafttrain.export.target_weights import embedding_of

HERE, THERE = "layers.0.", "midlayer."
"""Prefix of the layer's tensors in this format and in the official one."""

OWN_KEYS = (
    "draft_vocab_size",
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "norm_before_residual",
)
"""Fields of the drafter; the others describe its layer."""

ARCHITECTURES = {"eagle3": "Eagle3DraftModel", "p_eagle": "PEagleSpeculator"}
DRAFT_LENGTH = {"eagle3": "num_steps", "p_eagle": "num_depths"}
"""The setting of training that tells how many tokens to draft."""

P_EAGLE_KEYS = ("mask_token_id", OWN_EMBEDDING)
"""Fields that P-EAGLE has besides."""

EMBEDDING = "embed_tokens.weight"
VERSION = "0.9.0"


@dataclass
class SpeculatorsFormat:
    """EAGLE-3 and P-EAGLE as the speculators library writes them."""


@exporters.register("speculators", SpeculatorsFormat)
class SpeculatorsExporter(Exporter):
    """The official EAGLE-3 tensors under `layers.0.`; a config.json of two levels, without a `model_type` on the first.

    norm_before_residual is always written: without it, vLLM assumes true and speculators false. Tap i is the state entering
    block i, as in drafttrain. The embedding is the target's: speculators reads it from the file, and computes with uninitialized
    memory if it is missing.
    """

    reads: ClassVar[Mapping[str, str]] = {"eagle3": "eagle3", "p_eagle": "peagle"}
    readers = "vLLM, speculators"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the library refuses, and an embedding that cannot be found."""
        found = []
        if source.config.get("norm_before_fc") and source.config.get("fc_norm"):
            found.append(
                f"config.json: norm_before_fc and fc_norm are both true: speculators {VERSION} accepts only one of them"
            )
        if source.kind == "p_eagle" and source.config.get("fc_norm"):
            found.append(
                f"config.json: fc_norm is true: vLLM {VLLM_RELEASE} drops the fc_norm of P-EAGLE in this format and drafts worse; in its "
                "own format it reads it (--to vllm)"
            )
        folder = target_config.get(FOLDER)
        if EMBEDDING in source.tensors:
            return found
        if folder is None or embedding_of(Path(folder)) is None:
            found.append(
                f"{EMBEDDING}: must be written, but the target in {folder} has no embedding under a known name"
            )
        return found

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the tensors under this format's names with the target's embedding, and the fields on two levels."""
        given, kind = source.config, self.reads[source.kind]
        layer = {
            key: value
            for key, value in given.items()
            if key not in (*OWN_KEYS, *P_EAGLE_KEYS, "architectures", "dtype") and not key.startswith("drafttrain")
        }
        config = {
            "architectures": [ARCHITECTURES[source.kind]],
            "speculators_model_type": kind,
            "speculators_version": VERSION,
            **{key: given.get(key) for key in OWN_KEYS},
            **{key: bool(given.get(key)) for key in OWN_KEYS if "norm" in key},
            **{key: given[key] for key in P_EAGLE_KEYS if key in given},
            "tie_word_embeddings": False,
            "dtype": given.get("dtype", "float32"),
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": kind,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        # vLLM drafts this many tokens unless its command line gives another number.
                        "speculative_tokens": given["drafttrain"][DRAFT_LENGTH[source.kind]],
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
                "verifier": {
                    "name_or_path": target_config.get("_name_or_path", ""),
                    "architectures": target_config.get("architectures", []),
                },
            },
        }
        tensors = {name.replace(THERE, HERE): tensor for name, tensor in source.tensors.items()}
        if EMBEDDING not in tensors:
            embedding_VD = embedding_of(Path(target_config[FOLDER]))
            assert embedding_VD is not None, "refusals() checks it"
            tensors[EMBEDDING] = embedding_VD.to(source.tensors["fc.weight"].dtype)
        return replace(source, config=config, tensors=tensors)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what vLLM or the library would refuse or drop."""
        if "transformer_layer_config" not in files.config:
            return ["config.json: transformer_layer_config is missing"]
        found = []
        if "model_type" in files.config:
            found.append("config.json: model_type must be in transformer_layer_config only: vLLM refuses it here")
        if "norm_before_residual" not in files.config:
            found.append("config.json: norm_before_residual is missing: vLLM assumes true, speculators false")
        flat = {**files.config["transformer_layer_config"], **files.config}
        shape = [flat.get("vocab_size"), flat.get("hidden_size")]
        if EMBEDDING not in files.tensors:
            found.append(f"{EMBEDDING}: missing: speculators computes with uninitialized memory instead")
        elif list(files.tensors[EMBEDDING].shape) != shape:
            found.append(f"{EMBEDDING}: shape {list(files.tensors[EMBEDDING].shape)}, must be {shape}")
        kept = files.tensors.keys() - ({EMBEDDING} if not files.config.get(OWN_EMBEDDING) else set())
        official = {name.replace(HERE, THERE): files.tensors[name] for name in kept}
        same = layout_problems(replace(files, config=flat, tensors=official), target_config)
        return found + [line.replace(THERE, HERE) for line in same]

    def holds(self, folder: Path) -> bool:
        """Return whether config.json has the field that all such folders have."""
        return super().holds(folder) and "speculators_model_type" in read_config(folder)
