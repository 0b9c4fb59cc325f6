"""Export of DFlash for transformers' own generator, `generate(assistant_model=..., speculation_type="dflash")`.

The one class of transformers that drafts this way is Muse Glimmer's assistant, which computes what a DFlash drafter does. Written
after the source of 5.23, and tried with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems
from drafttrain.export.vllm import anchor_problems

MODEL_TYPE = "muse_glimmer_assistant"
RENAMED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
"""Tensors with other names there; all others keep theirs."""
SIZES = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("rms_norm_eps", "max_position_embeddings", "hidden_act", "rope_parameters", "block_size", "vocab_size"),
)


@dataclass
class TransformersFormat:
    """What transformers' DFlash generator loads."""


@exporters.register("transformers", TransformersFormat)
class TransformersExporter(Exporter):
    """A model of type `muse_glimmer_assistant` on one level, without embedding and head: the generator uses the target's.

    Its layers slide over 2,048 tokens unless `layer_types` says otherwise, so these are always written.
    """

    reads: ClassVar[Mapping[str, str]] = {"dflash": "dflash"}
    readers = "transformers (speculation_type dflash), vLLM (method dflash)"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the generator lacks: an own head, a causal block, a root's slot that predicts."""
        found = anchor_problems(source)
        if source.config["dflash_config"].get("causal"):
            found.append("config.json: dflash_config.causal is true: the slots of a block attend to all others there")
        if "lm_head.weight" in source.tensors:
            found.append("lm_head.weight: the generator computes logits with the target's head only")
        return found

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the tensors and fields under the names of this class."""
        given = source.config
        config = {
            "architectures": ["MuseGlimmerAssistantModel"],
            "model_type": MODEL_TYPE,
            **{key: given[key] for key in SIZES if key in given},
            "layer_types": ["full_attention"] * given["num_hidden_layers"],
            "mask_token_id": given["dflash_config"]["mask_token_id"],
            "target_layer_ids": given["dflash_config"]["target_layer_ids"],
            "dtype": given.get("dtype", "float32"),
            # Its defaults are tokens of another tokenizer.
            **{f"{name}_token_id": target_config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")},
        }
        tensors = {RENAMED.get(name, name): tensor for name, tensor in source.tensors.items()}
        return replace(source, config=config, tensors=tensors)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what transformers would refuse or silently drop."""
        found = [
            f"config.json: {key} is missing: transformers sets one of another model"
            for key in ("mask_token_id", "target_layer_ids", "block_size", "layer_types", "rope_parameters")
            if files.config.get(key) is None
        ]
        return found or layout_problems(as_dflash(files), target_config)

    def holds(self, folder: Path) -> bool:
        """Return whether config.json names this class."""
        return super().holds(folder) and read_config(folder).get("model_type") == MODEL_TYPE


def as_dflash(files: DrafterFiles) -> DrafterFiles:
    """Return the files under z-lab's names of tensors and fields."""
    names = {theirs: ours for ours, theirs in RENAMED.items()}
    config = {key: value for key, value in files.config.items() if key not in ("mask_token_id", "target_layer_ids")}
    nested = {key: files.config.get(key) for key in ("mask_token_id", "target_layer_ids")}
    return replace(
        files,
        config={**config, "dflash_config": {**nested, "causal": False}},
        tensors={names.get(name, name): tensor for name, tensor in files.tensors.items()},
    )
