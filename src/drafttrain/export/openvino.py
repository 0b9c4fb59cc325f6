"""Export for OpenVINO GenAI: the model as OpenVINO's graph, written by optimum-intel in its own environment and read back here.

V = the target's vocabulary, R = the drafter's, D = hidden
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from drafttrain.checkpoint import ABOUT
from drafttrain.core.files import write_json
from drafttrain.environments.known import OPENVINO
from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import kind_of, read_config, write_folder
from drafttrain.export.layout import layout_problems, text_config
from drafttrain.export.openvino_graph import GRAPH, read_graph, write_graph

TAPS = "hidden_layers_list"
"""Key in the graph's rt_info: the blocks whose output EAGLE-3 reads. Without it OpenVINO chooses them, and only from 10 layers on."""

NUM_TAPS = 3
FREQUENCIES = "rotary_emb.inv_freq"
ONLY_FALSE = {
    "norm_before_residual": "the residual is taken before the norm",
    "norm_before_fc": "the tapped states are not normed",
    "fc_norm": "the tapped states are not normed",
    "norm_output": "the state that is fed back is not normed",
}
"""Fields of EAGLE-3 that OpenVINO's class does not read, and what it computes instead."""


@dataclass
class OpenVinoFormat:
    """What OpenVINO GenAI loads."""


@exporters.register("openvino", OpenVinoFormat)
class OpenVinoExporter(Exporter):
    """Plain language models, and EAGLE-3 as optimum-intel implements it; weights in float32, which holds the other types exactly."""

    reads: ClassVar[Mapping[str, str]] = {"causal_lm": "draft_model", "eagle3": "draft_model (eagle3_mode)"}
    readers = "OpenVINO GenAI"
    environment = OPENVINO

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what OpenVINO would refuse or silently compute differently."""
        found = layout_problems(source, target_config)
        if source.kind != "eagle3":
            return found + _rotation_problems(source.config)
        found += [
            f"config.json: {key} is {source.config[key]!r}: OpenVINO does not read it: in OpenVINO, {what}"
            for key, what in ONLY_FALSE.items()
            if source.config.get(key)
        ]
        return [*found, *taps_problems(source.config, target_config)]

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the weights under the graph's names, and the taps in its numbering."""
        config = {key: value for key, value in source.config.items() if not key.startswith("drafttrain")}
        config["dtype"] = "float32"
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in source.tensors.items()
        }
        notes: tuple[str, ...] = ()
        if source.kind == "eagle3":
            taps = [tap - 1 for tap in config["eagle_aux_hidden_state_layer_ids"]]
            config[TAPS] = taps
            rows, width = config["draft_vocab_size"], config["hidden_size"]
            # OpenVINO replaces the embedding by the target's. It always needs d2t, and never t2d.
            tensors["embed_tokens.weight"] = torch.zeros(config["vocab_size"], width)
            tensors.setdefault("d2t", torch.zeros(rows, dtype=torch.int64))
            tensors.pop("t2d", None)
            notes = (
                f"{TAPS} is {taps}: OpenVINO names the block whose output is read, the drafter's config the block that the state enters",
            )
        return replace(source, config=config, tensors=tensors | {FREQUENCIES: _frequencies(config)}, notes=notes)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return nothing: refusals() covers all problems of a graph that equals its source."""
        return []

    def write(self, files: DrafterFiles, source: Path, folder: Path) -> None:
        """Write the graph and the tokenizer in OpenVINO's environment; config.json stays the drafter's own.

        Raises:
            EngineError: OpenVINO is not installed here, or cannot convert this.
        """
        with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
            tensors = {name: tensor for name, tensor in files.tensors.items() if name != FREQUENCIES}
            write_folder(replace(files, tensors=tensors), source, Path(temporary))
            write_graph(Path(temporary), folder, taps=files.config.get(TAPS))
        write_json(folder / "config.json", dict(files.config))
        if (source / ABOUT).exists():
            shutil.copyfile(source / ABOUT, folder / ABOUT)

    def read(self, folder: Path) -> DrafterFiles:
        """Return the contents of a folder: its graph and config.json."""
        kind, config = kind_of(folder), read_config(folder)
        notes, tensors = read_graph(folder)
        if kind == "eagle3":
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            config[TAPS] = [int(word) for word in notes.get(TAPS, "").split()]
        return DrafterFiles(kind, config, tensors, folder=folder)

    def holds(self, folder: Path) -> bool:
        """Return whether a folder has such a graph."""
        return (folder / GRAPH).is_file()


def taps_problems(config: Mapping[str, Any], target_config: Mapping[str, Any]) -> list[str]:
    """Return why OpenVINO cannot provide the states that an EAGLE-3 drafter reads."""
    taps, width = list(config["eagle_aux_hidden_state_layer_ids"]), config["hidden_size"]
    layers = text_config(target_config).get("num_hidden_layers")
    found = []
    if len(taps) != NUM_TAPS:
        found.append(
            f"config.json: eagle_aux_hidden_state_layer_ids is {taps}: OpenVINO reads exactly {NUM_TAPS} states"
        )
    if any(tap < 1 or (layers is not None and tap >= layers) for tap in taps):
        found.append(
            f"config.json: eagle_aux_hidden_state_layer_ids is {taps}: OpenVINO reads outputs of the target's blocks, 1..{(layers or 0) - 1}"
        )
    if (config.get("target_hidden_size") or width) != width:
        found.append(
            f"config.json: target_hidden_size is {config['target_hidden_size']}, hidden_size {width}: OpenVINO gives the drafter the "
            "target's embedding, so they must be equal"
        )
    return found


def _rotation_problems(config: Mapping[str, Any]) -> list[str]:
    """Return that the model lacks the single rotary embedding of the Llama family, without which a graph cannot be checked."""
    rope = getattr(_read(config), "rope_parameters", None)
    if rope is not None and "rope_type" in rope:
        return []
    has = "one for each kind of layer" if rope else "none"
    return [
        f"config.json: model_type is {config.get('model_type')!r}: only models with one rotary embedding for all layers are "
        f"supported, this one has {has}"
    ]


def _frequencies(config: Mapping[str, Any]) -> torch.Tensor:
    """Return the frequencies of the rotary embedding of a configuration; the graph stores them as numbers."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    frequencies: torch.Tensor = LlamaRotaryEmbedding(_read(config)).inv_freq
    return frequencies


def _read(config: Mapping[str, Any]) -> Any:
    """Return a configuration as a transformers object."""
    from transformers import AutoConfig

    own = {key: value for key, value in config.items() if key not in ("architectures", TAPS)}
    return AutoConfig.for_model(own.pop("model_type"), **own)
