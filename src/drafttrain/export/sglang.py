"""Export for SGLang: EAGLE-3 with its own numbering of taps, EAGLE-1, Domino, standalone drafters. After the source of 0.5.23, never loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from drafttrain.drafters.eagle.eagle1 import FC_BIAS
from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import layout_problems
from drafttrain.export.target_logits import cap_of

READ_IN = "0.5.23"
"""The release of SGLang whose source this file follows; a test reads it again if its wheel can be downloaded."""

IGNORED = ("norm_before_residual",)
"""Variants of EAGLE-3 that its layer lacks: it would silently run another one."""

BIAS = "fc.bias"


@dataclass
class SglangFormat:
    """What SGLang's EAGLE, EAGLE3, DFLASH (Domino) and STANDALONE load."""


@exporters.register("sglang", SglangFormat)
class SglangExporter(Exporter):
    """The official layouts; taps, in `eagle_config`, are the blocks whose OUTPUT is read: one less than drafttrain's.

    EAGLE-1's fc has a bias in SGLang: the drafter's own, or zeros, because SGLang leaves a missing bias at random values.
    """

    reads: ClassVar[Mapping[str, str]] = {
        "causal_lm": "STANDALONE",
        "eagle": "EAGLE",
        "eagle3": "EAGLE3",
        "domino": "DFLASH",
    }
    readers = "SGLang (from its source, not tried)"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what SGLang's Domino lacks."""
        return _domino_problems(source)

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files with SGLang's numbering of taps, and the fields that it reads."""
        config = {key: value for key, value in source.config.items() if not key.startswith("drafttrain")}
        if source.kind == "eagle":
            config.pop(FC_BIAS, None)
            if cap := cap_of(target_config):
                # SGLang caps logits by the drafter's own configuration; it reads no scale.
                config["final_logit_softcapping"] = cap
            return _with_bias(replace(source, config=config | {"architectures": ["LlamaForCausalLMEagle"]}))
        if source.kind == "domino":
            return replace(source, config=config, notes=(f"SGLang drafts {config['block_size'] - 1} tokens a round",))
        if source.kind != "eagle3":
            return replace(source, config=config)
        ours = config.pop("eagle_aux_hidden_state_layer_ids")
        theirs = [tap - 1 for tap in ours]
        config["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": theirs}
        note = f"taps {ours} are written as {theirs}: SGLang counts the blocks whose output is read"
        return replace(source, config=config, notes=(note,))

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what SGLang would ignore."""
        if files.kind == "domino":
            return [*_domino_problems(files), *layout_problems(files, target_config)]
        if files.kind == "eagle":
            return layout_problems(replace(files, config={**files.config, FC_BIAS: True}), target_config)
        if files.kind != "eagle3":
            return layout_problems(files, target_config)
        try:
            theirs = files.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        except (KeyError, TypeError):
            return [
                "config.json: eagle_config.eagle_aux_hidden_state_layer_ids is missing: SGLang would use its own taps"
            ]
        taps = [tap + 1 for tap in theirs]
        found = layout_problems(
            replace(files, config={**files.config, "eagle_aux_hidden_state_layer_ids": taps}), target_config
        )
        if 0 in taps:
            found.append(
                f"config.json: eagle_aux_hidden_state_layer_ids is {taps}: SGLang reads outputs of blocks, and no block comes before the first"
            )
        return found + [
            f"config.json: {key} is true: SGLang {READ_IN} has no such variant and silently runs another"
            for key in IGNORED
            if files.config.get(key)
        ]


def _domino_problems(files: DrafterFiles) -> list[str]:
    """Return the variants of Domino that SGLang refuses."""
    if files.kind != "domino":
        return []
    found, length = [], files.config["dflash_config"].get("pure_draft_prefix_len")
    if length != 1:
        found.append(f"config.json: dflash_config.pure_draft_prefix_len is {length}: SGLang {READ_IN} supports 1 only")
    if files.config.get("draft_vocab_size") is not None:
        found.append(
            f"config.json: draft_vocab_size is {files.config['draft_vocab_size']}: SGLang {READ_IN} runs Domino with the "
            "target's vocabulary and head only: train with drafter.draft_vocab_size=null"
        )
    return found


def _with_bias(files: DrafterFiles) -> DrafterFiles:
    if BIAS in files.tensors:
        return files
    weight_DX = files.tensors["fc.weight"]
    tensors = {**files.tensors, BIAS: torch.zeros(weight_DX.shape[0], dtype=weight_DX.dtype)}
    return replace(files, tensors=tensors, notes=(f"{BIAS} is added with zeros: SGLang's fc has a bias",))
