"""Export in the `speculators` format: a drafter with the name and embedding of its target, which `vllm serve FOLDER` serves unchanged.

Written after the source of speculators 0.9.0, which loads it, and of vLLM 0.32.0, which reads the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.drafters.p_eagle.settings import OWN_EMBEDDING
from drafttrain.export import FOLDER, Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems
from drafttrain.export.speculators_kinds import EMBEDDING, KINDS, VERSION
from drafttrain.export.target_weights import embedding_of


@dataclass
class SpeculatorsFormat:
    """EAGLE-3, P-EAGLE, DFlash and DSpark as the speculators library writes them."""


@exporters.register("speculators", SpeculatorsFormat)
class SpeculatorsExporter(Exporter):
    """A config.json of two levels, without a `model_type` on the first.

    The embedding that it writes is the target's.
    """

    reads: ClassVar[Mapping[str, str]] = {ours: kind.name for ours, kind in KINDS.items()}
    readers = "vLLM, speculators"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the library refuses, and an embedding that cannot be found."""
        kind = KINDS[source.kind]
        found = kind.refusals(source, target_config)
        folder = target_config.get(FOLDER)
        if EMBEDDING in source.tensors or not kind.has_embedding:
            return found
        if folder is None or embedding_of(Path(folder)) is None:
            found.append(
                f"{EMBEDDING}: must be written, but the target in {folder} has no embedding under a known name"
            )
        return found

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the tensors under this format's names with the target's embedding, and the fields on two levels."""
        given, kind = source.config, KINDS[source.kind]
        layer = {
            key: value
            for key, value in given.items()
            if key not in (*kind.own_keys, "architectures", "dtype") and not key.startswith("drafttrain")
        }
        config = {
            "architectures": [kind.architecture],
            "speculators_model_type": kind.name,
            "speculators_version": VERSION,
            **kind.fields(given),
            "tie_word_embeddings": False,
            "dtype": given.get("dtype", "float32"),
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": kind.name,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        # vLLM drafts this many tokens unless its command line gives another number.
                        "speculative_tokens": kind.num_draft_tokens(given),
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
        tensors = kind.tensors(source, target_config)
        if EMBEDDING not in tensors and kind.has_embedding:
            embedding_VD = embedding_of(Path(target_config[FOLDER]))
            assert embedding_VD is not None, "refusals() checks it"
            tensors[EMBEDDING] = embedding_VD.to(source.tensors["fc.weight"].dtype)
        return replace(source, config=config, tensors=tensors, notes=(*source.notes, *kind.notes(given)))

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what vLLM or the library would refuse or drop."""
        if "transformer_layer_config" not in files.config:
            return ["config.json: transformer_layer_config is missing"]
        found = []
        if "model_type" in files.config:
            found.append("config.json: model_type must be in transformer_layer_config only: vLLM refuses it here")
        kind = KINDS[files.kind]
        found += kind.field_problems(files.config)
        flat = {**files.config["transformer_layer_config"], **files.config}
        shape = [flat.get("vocab_size"), flat.get("hidden_size")]
        if EMBEDDING not in files.tensors and kind.has_embedding:
            found.append(f"{EMBEDDING}: missing: speculators computes with uninitialized memory instead")
        elif EMBEDDING in files.tensors and list(files.tensors[EMBEDDING].shape) != shape:
            found.append(f"{EMBEDDING}: shape {list(files.tensors[EMBEDDING].shape)}, must be {shape}")
        kept = files.tensors.keys() - ({EMBEDDING} if not files.config.get(OWN_EMBEDDING) else set())
        rest = {name: files.tensors[name] for name in kept}
        official, theirs, ours = kind.official(replace(files, config=flat, tensors=rest))
        same = layout_problems(official, target_config)
        return found + [line.replace(theirs, ours) if theirs else line for line in same]

    def holds(self, folder: Path) -> bool:
        """Return whether config.json has the field that all such folders have."""
        return super().holds(folder) and "speculators_model_type" in read_config(folder)
