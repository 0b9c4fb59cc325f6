"""Export as a plain Hugging Face folder: config.json, model.safetensors, the tokenizer. Other formats are made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drafttrain.checkpoint import About, write_about
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside
from drafttrain.core.foreign import own_files, read_json
from drafttrain.core.tensors import read_tensors
from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import counts_outputs, layout_problems
from drafttrain.target_model.tokenizer import tokenizer_files


@dataclass
class HuggingFaceFormat:
    """A plain Hugging Face folder."""


@exporters.register("hf", HuggingFaceFormat)
class HuggingFaceExporter(Exporter):
    """What training exports: the layouts that Hugging Face loaders know, and drafttrain's own for Kangaroo."""

    reads: ClassVar[Mapping[str, str]] = {
        "causal_lm": "AutoModelForCausalLM",
        "sorted_lm": "AutoModelForCausalLM (the last exit), drafttrain",
        "matformer": "AutoModelForCausalLM",
        "medusa": "MedusaModel",
        "eagle": "EagleLlamaForCausalLM",
        "eagle3": "LlamaForCausalLMEagle3",
        "p_eagle": "LlamaForCausalLMEagle3",
        "kangaroo": "drafttrain",
        "dflash": "DFlashDraftModel",
        "dspark": "drafttrain",
        "mtp": "drafttrain",
        "domino": "DominoDraftModel",
        "dflash2": "drafttrain",
        "xpress": "Qwen3XPressModel",
    }
    readers = "transformers (causal_lm, sorted_lm, matformer), vLLM and SGLang (all but sorted_lm, matformer, kangaroo, mtp, dspark, domino, dflash2 and xpress), drafttrain"

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files unchanged."""
        return source

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return names, shapes and fields that differ from the layout of the kind."""
        return layout_problems(files, target_config)

    def holds(self, folder: Path) -> bool:
        """Return whether this is such a folder, and not one of SGLang's, whose taps count outputs of blocks."""
        return super().holds(folder) and not counts_outputs(read_config(folder))


def export_hf(trained: Path, folder: Path, *, tokenizer: Any, about: About, dtype: str) -> None:
    """Write the drafter folder from the weights that training saved, and read the files back.

    Args:
        trained: Folder that `Drafter.save` wrote.
        tokenizer: The target's.
        dtype: Type of the weights in the file.

    Raises:
        CheckpointError: The file read back differs from what was written.
    """
    with folder_beside(folder) as temporary:
        tensors = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in read_tensors(trained / "model.safetensors").items()
        }
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config = read_json(trained / "config.json")
        config["dtype"] = dtype
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        own_files(trained)
        for other in trained.iterdir():
            if other.name not in ("config.json", "model.safetensors"):
                copy = shutil.copytree if other.is_dir() else shutil.copyfile
                copy(other, temporary / other.name)
        # `Drafter.save` writes a tokenizer only if it is the drafter's own.
        own_tokenizer = bool(tokenizer_files(trained))
        if not own_tokenizer:
            tokenizer.save_pretrained(temporary)
        write_about(temporary, replace(about, own_tokenizer=own_tokenizer))
        _read_back(temporary / "model.safetensors", tensors)


def _read_back(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        wrong = [name for name in tensors if not torch.equal(file.get_tensor(name), tensors[name])]
        if wrong or set(file.keys()) != set(tensors):
            raise CheckpointError(f"{path}: {len(wrong)} tensors read back differ from what was written: {wrong[:5]}")
