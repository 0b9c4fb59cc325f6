"""Export in the `speculators` format: EAGLE-3 with the target's name inside, which `vllm serve FOLDER` serves as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.export import DrafterFiles, Exporter, exporters
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems

HERE, THERE = "layers.0.", "midlayer."
"""How tensors of the layer begin in this format and in the official one."""

OWN_KEYS = (
    "draft_vocab_size",
    "target_hidden_size",
    "eagle_aux_hidden_state_layer_ids",
    "fc_norm",
    "norm_output",
    "norm_before_residual",
)
"""Fields of the drafter itself; the others describe its layer."""


@dataclass
class SpeculatorsFormat:
    """EAGLE-3 as the speculators library writes it."""


@exporters.register("speculators", SpeculatorsFormat)
class SpeculatorsExporter(Exporter):
    """The official EAGLE-3 tensors under `layers.0.`; a config.json of two levels, without a `model_type` on the first.

    norm_before_residual is true where it is left out, so it is always written. Tap i is the state entering block i, as here.
    """

    reads: ClassVar[Mapping[str, str]] = {"eagle3": "eagle3"}
    readers = "vLLM, speculators"

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the tensors under their other names, and the fields on two levels."""
        given = source.config
        layer = {
            key: value
            for key, value in given.items()
            if key not in (*OWN_KEYS, "architectures", "dtype") and not key.startswith("drafttrain")
        }
        config = {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            **{key: given.get(key) for key in OWN_KEYS},
            "norm_before_residual": bool(given.get("norm_before_residual", False)),
            "norm_before_fc": False,
            "tie_word_embeddings": False,
            "dtype": given.get("dtype", "float32"),
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": 3,
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
        return replace(source, config=config, tensors=tensors)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what vLLM would refuse or drop."""
        if "transformer_layer_config" not in files.config:
            return ["config.json: transformer_layer_config is missing"]
        found = []
        if "model_type" in files.config:
            found.append("config.json: model_type must be in transformer_layer_config only: vLLM refuses it here")
        if "norm_before_residual" not in files.config:
            found.append("config.json: norm_before_residual is missing: loaders take it to be true")
        flat = {**files.config["transformer_layer_config"], **files.config}
        official = {name.replace(HERE, THERE): tensor for name, tensor in files.tensors.items()}
        same = layout_problems(replace(files, config=flat, tensors=official), target_config)
        return found + [line.replace(THERE, HERE) for line in same]

    def holds(self, folder: Path) -> bool:
        """Tell by the field that every such folder has."""
        return super().holds(folder) and "speculators_model_type" in read_config(folder)
