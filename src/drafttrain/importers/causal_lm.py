"""A plain Hugging Face causal LM with the target's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.drafters.causal_lm.module import rows_problem
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS, Shapes
from drafttrain.importers import Claim, Given, Imported, Importer, importers
from drafttrain.importers.copies import ANGLES
from drafttrain.importers.naming import renamed, without
from drafttrain.importers.target import TargetFiles

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass
class CausalLMLayout:
    """A plain causal LM."""


@importers.register("causal_lm", CausalLMLayout)
class CausalLMImporter(Importer):
    """Any model that `AutoModelForCausalLM` builds without code from the folder; it is not changed."""

    holds: ClassVar[str] = "causal_lm"
    claim = Claim.MODEL
    known_by: ClassVar[str] = "a model_type of transformers in config.json, and no mark of another layout"

    def recognises(self, given: Given) -> bool:
        """Return whether config.json has a model type."""
        return bool(given.config.get("model_type"))

    def target_of(self, given: Given) -> str | None:
        """Return None: a plain model names no target."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the files unchanged, without the copies of tied tensors."""
        found, notes = [], []
        if "auto_map" in given.config:
            found.append("config.json: auto_map names code in the folder, which is not run")
        shapes, wrong = _shapes(given.config)
        rows = given.config.get("vocab_size")
        if isinstance(rows, int) and (problem := rows_problem(rows, target.num_tokens)):
            found.append(f"config.json: {problem}")
        elif isinstance(rows, int) and rows != target.size("vocab_size"):
            notes.append(
                f"config.json: vocab_size is {rows}, the target {target.name} has {target.size('vocab_size')}: the same "
                "tokens with different padding, which vLLM refuses"
            )
        if wrong:
            return Imported(DrafterFiles("causal_lm", given.config, {}), [*found, *wrong], notes)
        given = without(given, [name for name in given.tensors if name.endswith(ANGLES)])
        if HEAD in given.tensors and HEAD not in shapes and EMBEDDING in given.tensors:
            if torch.equal(given.tensors[HEAD], given.tensors[EMBEDDING]):
                given = without(given, [HEAD])
                notes.append(f"{HEAD}: dropped, it is tied to {EMBEDDING}")
            else:
                found.append(
                    f"{given.files[HEAD]}: {HEAD}: differs from {EMBEDDING}, but tie_word_embeddings in config.json is true"
                )
                given = without(given, [HEAD])
        tensors, named = renamed(given, shapes, ours=str, theirs=str)
        return Imported(DrafterFiles("causal_lm", given.config, tensors), [*found, *named], notes)


def _shapes(config: Mapping[str, Any]) -> tuple[Shapes, list[str]]:
    """Return (names and shapes of the tensors of the model in config.json, problems)."""
    try:
        return LAYOUTS["causal_lm"][0](config), []
    except Exception as error:  # each architecture checks its configuration in its own way
        message = " ".join(str(error).split())[:300]
        return {}, [f"config.json: transformers cannot build a causal LM from it: {type(error).__name__}: {message}"]
