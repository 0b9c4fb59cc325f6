"""Export for vLLM: what its draft_model, medusa, eagle, eagle3 and dflash methods load. Written after the source of 0.32.0 and tried with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.environments.known import VLLM_RELEASE
from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import counts_outputs, layout_problems, text_config
from drafttrain.export.target_logits import cap_of, scale_of
from drafttrain.export.target_weights import scales_embedding

ON_FINAL_STATE = ("eagle", "medusa")
"""Kinds whose logits are scaled like the target's: they were trained through its head, or through heads on its final state."""


@dataclass
class VllmFormat:
    """What vLLM's speculative decoding loads."""


@exporters.register("vllm", VllmFormat)
class VllmExporter(Exporter):
    """The layouts of Hugging Face and of the papers' authors, as vLLM reads them.

    P-EAGLE is EAGLE-3 to vLLM, with `parallel_drafting` in the speculative configuration, which no file can set.
    Tap i of EAGLE-3 is the state entering block i, in drafttrain and in vLLM. DFlash has z-lab's layout, whose ids are of blocks
    whose output is read; vLLM adds 1. What vLLM silently drops is refused: a bias of fc,
    biases of Medusa's blocks unless medusa_fc_bias is true, the order of the taps (it sorts them), a missing norm or d2t.
    """

    reads: ClassVar[Mapping[str, str]] = {
        "causal_lm": "draft_model",
        "medusa": "medusa",
        "eagle": "eagle",
        "eagle3": "eagle3",
        "dflash": "dflash",
        "p_eagle": "eagle3",
    }
    readers = "vLLM"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what vLLM lacks: a bias of fc, a root's slot that predicts, the factor of the target's embedding."""
        return [*fc_bias_problems(source), *anchor_problems(source), *embedding_problems(source, target_config)]

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files without drafttrain's own fields; the layout is vLLM's already, but for Medusa's vocabulary.

        Drafters on the target's final state get its logit scale, which vLLM reads from their own configuration.
        """
        source = over_all_tokens(source)
        config = {key: value for key, value in source.config.items() if not key.startswith("drafttrain")}
        if source.kind not in ON_FINAL_STATE and not (
            source.kind == "dflash" and "lm_head.weight" not in source.tensors
        ):
            return replace(source, config=config)
        notes = source.notes
        if (scale := scale_of(target_config)) != 1:
            config["logit_scale"] = scale
        if cap := cap_of(target_config):
            notes = (
                *notes,
                f"the target's soft cap of {cap:g} on logits cannot be applied by vLLM {VLLM_RELEASE}: sampled drafts are drawn without it",
            )
        return replace(source, config=config, notes=notes)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what vLLM would refuse or drop."""
        found = [*self.refusals(files, target_config), *layout_problems(files, target_config)]
        if files.kind == "medusa" and not files.config.get("medusa_fc_bias"):
            found.append("config.json: medusa_fc_bias is not true: vLLM silently drops the biases of the blocks")
        return found

    def holds(self, folder: Path) -> bool:
        """Return whether this is such a folder, and not one of SGLang's, whose taps count outputs of blocks."""
        return super().holds(folder) and not counts_outputs(read_config(folder))


def fc_bias_problems(files: DrafterFiles) -> list[str]:
    """Return that the bias of EAGLE-1's fc would be dropped, if the folder has one."""
    bias_D = files.tensors.get("fc.bias")
    if files.kind != "eagle" or bias_D is None:
        return []
    return [
        f"fc.bias: {int((bias_D != 0).sum())} of {bias_D.numel()} values are not zero: vLLM {VLLM_RELEASE} silently drops them "
        "and drafts worse; SGLang uses them (--to sglang)"
    ]


def anchor_problems(files: DrafterFiles) -> list[str]:
    """Return that a DFlash drafter whose root's slot predicts cannot be loaded, if this is one."""
    if files.kind != "dflash" or not files.config.get("sample_from_anchor"):
        return []
    return [
        f"config.json: sample_from_anchor is true: vLLM {VLLM_RELEASE} and transformers read slot s as a guess of token s, so all "
        "drafts would be one place off: train with drafter.sample_from_anchor=false"
    ]


def embedding_problems(files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
    """Return that DFlash would read other embeddings than it was trained on, if the target multiplies its own."""
    if files.kind != "dflash" or not scales_embedding(target_config):
        return []
    return [
        f"the target ({text_config(target_config)['model_type']}) multiplies its embeddings by a factor, and vLLM {VLLM_RELEASE} "
        "gives DFlash the plain rows: its drafts would be wrong. transformers and z-lab's code read them as the target does"
    ]


def over_all_tokens(files: DrafterFiles) -> DrafterFiles:
    """Return Medusa's files with a row for every token of the target; heads without a vocabulary of their own have that.

    vLLM reads `token_map`, but stops because it did not load it as a weight. The row of a token that the heads lack is the mean
    of their rows: its logit is the mean of all others, so it is never the likeliest, and vLLM drafts the likeliest only.
    """
    ids_R = files.tensors.get("token_map")
    if files.kind != "medusa" or ids_R is None:
        return files
    size = files.config["vocab_size"]
    tensors = {name: tensor for name, tensor in files.tensors.items() if name != "token_map"}
    for name, rows_RD in tensors.items():
        if name.startswith("lm_heads."):
            tensors[name] = rows_RD.float().mean(dim=0).to(rows_RD.dtype).repeat(size, 1)
            tensors[name][ids_R] = rows_RD
    config = {key: value for key, value in files.config.items() if key != "truncated_vocab_size"}
    note = f"vLLM {VLLM_RELEASE} cannot load token_map: the heads have all {size} rows there, those of other tokens never win"
    return replace(files, config=config, tensors=tensors, notes=(*files.notes, note))
