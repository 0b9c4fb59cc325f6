"""The kinds of drafter in the `speculators` format: the fields and tensors of each, and back to the official layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from drafttrain.drafters.dflash.config import layer_ids, taps_in
from drafttrain.drafters.dspark.dspark import FIELDS
from drafttrain.drafters.p_eagle.settings import OWN_EMBEDDING
from drafttrain.environments.known import VLLM_RELEASE
from drafttrain.export import FOLDER
from drafttrain.export.deepspec import vanilla_notes
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.target_weights import embedding_of, head_of
from drafttrain.export.vllm import anchor_problems, embedding_problems

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
VERSION = "0.9.0"


class SpeculatorsKind(Protocol):
    """One kind of drafter in the format."""

    name: ClassVar[str]
    """The format's name of the kind."""
    architecture: ClassVar[str]
    has_embedding: ClassVar[bool]
    """The library reads the embedding from the file, and computes with uninitialized memory if it is missing."""
    own_keys: ClassVar[tuple[str, ...]]
    """Fields of the drafter in drafttrain's config.json; the others describe its layers."""

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the format cannot hold."""
        ...

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the first level."""
        ...

    def num_draft_tokens(self, config: Mapping[str, Any]) -> int:
        """Return how many tokens vLLM drafts unless its command line gives another number."""
        ...

    def tensors(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors under the format's names, without the embedding."""
        ...

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """Return what some readers do not have, for the user."""
        ...

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return fields whose absence readers fill in differently."""
        ...

    def official(self, files: DrafterFiles) -> tuple[DrafterFiles, str, str]:
        """Return (the files in the official layout, a prefix of its names, the format's prefix instead of it).

        Args:
            files: With the fields of both levels on one, and without the embedding.
        """
        ...


class Eagle3:
    """The official EAGLE-3 tensors under `layers.0.`.

    norm_before_residual is always written: without it, vLLM assumes true and speculators false. Tap i is the state entering
    block i, as in drafttrain.
    """

    name: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "Eagle3DraftModel"
    has_embedding: ClassVar[bool] = True
    own_keys: ClassVar[tuple[str, ...]] = (
        *("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids"),
        *("norm_before_fc", "fc_norm", "norm_output", "norm_before_residual"),
    )
    here, there = "layers.0.", "midlayer."
    """Prefix of the layer's tensors in this format and in the official one."""

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return two norms that the library does not have together."""
        if not (source.config.get("norm_before_fc") and source.config.get("fc_norm")):
            return []
        return [
            f"config.json: norm_before_fc and fc_norm are both true: speculators {VERSION} accepts only one of them"
        ]

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return EAGLE-3's fields."""
        given = {key: config.get(key) for key in self.own_keys}
        return given | {key: bool(value) for key, value in given.items() if "norm" in key}

    def num_draft_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the steps of the training's rollout."""
        steps: int = config["drafttrain"]["num_steps"]
        return steps

    def tensors(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors with the format's prefix."""
        return {name.replace(self.there, self.here): tensor for name, tensor in source.tensors.items()}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing."""
        return []

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return that norm_before_residual is missing."""
        if "norm_before_residual" in config:
            return []
        return ["config.json: norm_before_residual is missing: vLLM assumes true, speculators false"]

    def official(self, files: DrafterFiles) -> tuple[DrafterFiles, str, str]:
        """Return the files with the official prefix."""
        tensors = {name.replace(self.here, self.there): tensor for name, tensor in files.tensors.items()}
        return replace(files, tensors=tensors), self.there, self.here


class PEagle(Eagle3):
    """EAGLE-3 with further layers, and a mask token."""

    name: ClassVar[str] = "peagle"
    architecture: ClassVar[str] = "PEagleSpeculator"
    own_keys: ClassVar[tuple[str, ...]] = (*Eagle3.own_keys, "mask_token_id", OWN_EMBEDDING)

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return a norm that vLLM would drop too."""
        found = super().refusals(source, target_config)
        if source.config.get("fc_norm"):
            found.append(
                f"config.json: fc_norm is true: vLLM {VLLM_RELEASE} drops the fc_norm of P-EAGLE in this format and drafts worse; in its "
                "own format it reads it (--to vllm)"
            )
        return found

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return P-EAGLE's fields; those that EAGLE-3 lacks only if they are given."""
        given = super().fields(config)
        return {key: value for key, value in given.items() if key in Eagle3.own_keys or key in config}

    def num_draft_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the depths of training."""
        depths: int = config["drafttrain"]["num_depths"]
        return depths


class DFlash:
    """z-lab's tensors and a head, which is the target's if the drafter has none. Taps count as in drafttrain: states entering blocks.

    sliding_window_non_causal is true: it concerns sliding layers, of which there are none, but vLLM 0.32.0 makes every layer causal
    if it is false (vllm#56692). For the same reason a causal block cannot be told from it in the library, and is refused.
    """

    name: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    has_embedding: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = (
        *("draft_vocab_size", "block_size", "dflash_config", "sample_from_anchor", "num_target_layers"),
    )

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return a causal block, a root's slot that predicts, an embedding with a factor, a head that cannot be found."""
        found = [*anchor_problems(source), *embedding_problems(source, target_config)]
        if source.config["dflash_config"].get("causal"):
            found.append("config.json: dflash_config.causal is true: this format has no field for it")
        if HEAD not in source.tensors and _target_head(target_config) is None:
            found.append(f"{HEAD}: must be written, but the target has no head under a known name")
        return found

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return DFlash's fields."""
        return {
            "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
            "block_size": config["block_size"],
            "aux_hidden_state_layer_ids": list(taps_in(config)),
            "mask_token_id": config["dflash_config"]["mask_token_id"],
            "sliding_window_non_causal": True,
            "sample_from_anchor": bool(config.get("sample_from_anchor")),
        }

    def num_draft_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the slots of a block that predict: the mask tokens, and the root's if it predicts too."""
        size: int = config["block_size"]
        return size if config.get("sample_from_anchor") else size - 1

    def tensors(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors with a head."""
        if HEAD in source.tensors:
            return dict(source.tensors)
        head_VD = _target_head(target_config)
        assert head_VD is not None, "refusals() checks it"
        return {**source.tensors, HEAD: head_VD.to(source.tensors["fc.weight"].dtype)}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing."""
        return []

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return a field that makes vLLM's attention causal."""
        if config.get("sliding_window_non_causal", True):
            return []
        return ["config.json: sliding_window_non_causal is false: vLLM makes full attention causal too (vllm#56692)"]

    def official(self, files: DrafterFiles) -> tuple[DrafterFiles, str, str]:
        """Return the files with z-lab's fields."""
        given = files.config
        nested = {
            "mask_token_id": given.get("mask_token_id"),
            "target_layer_ids": layer_ids(given.get("aux_hidden_state_layer_ids") or ()),
            "causal": False,
        }
        return replace(files, config={**given, "dflash_config": nested}), "", ""


class DSparkBlock(DFlash):
    """DFlash's tensors, and the heads under our own names, which are DeepSpec's.

    sample_from_anchor is always written: without it, vLLM 0.32.0 assumes false in this format, and speculators true.
    """

    name: ClassVar[str] = "dspark"
    architecture: ClassVar[str] = "DSparkDraftModel"
    own_keys: ClassVar[tuple[str, ...]] = (*DFlash.own_keys, *FIELDS.values())

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return DFlash's fields and those of the heads."""
        return super().fields(config) | {key: config[key] for key in FIELDS.values()}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """Return that vLLM lacks this Markov head."""
        return vanilla_notes(config)

    def field_problems(self, config: Mapping[str, Any]) -> list[str]:
        """Return a field that makes vLLM's attention causal, and missing fields that readers fill in differently."""
        missing = [key for key in ("sample_from_anchor", *FIELDS.values()) if config.get(key) is None]
        return [*super().field_problems(config), *(f"config.json: {key} is missing" for key in missing)]


KINDS: Mapping[str, SpeculatorsKind] = {
    "eagle3": Eagle3(),
    "p_eagle": PEagle(),
    "dflash": DFlash(),
    "dspark": DSparkBlock(),
}


def _target_head(target_config: Mapping[str, Any]) -> Tensor | None:
    """Return the target's output matrix, which may be its embedding."""
    folder = target_config.get(FOLDER)
    if folder is None:
        return None
    head_VD = head_of(Path(folder))
    return embedding_of(Path(folder)) if head_VD is None else head_VD
