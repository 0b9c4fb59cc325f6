"""A plain Hugging Face causal LM with the target's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.drafters.causal_lm.module import rows_problem
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS, Shapes
from drafttrain.importers import Given, Imported, Importer, importers
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
    """Whatever `AutoModelForCausalLM` builds without code that comes with the folder; kept as it is."""

    holds: ClassVar[str] = "causal_lm"
    known_by: ClassVar[str] = "a model_type of transformers in config.json, and none of the others' marks"

    def recognises(self, given: Given) -> bool:
        """Tell by a model type that no other layout explains."""
        others = [importers.entry(name).component() for name in importers.names() if name != "causal_lm"]
        return bool(given.config.get("model_type")) and not any(other.recognises(given) for other in others)

    def target_of(self, given: Given) -> str | None:
        """Return nothing: such a model is of nobody."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the files as they are, without tied tensors that are there twice."""
        found, notes = [], []
        if "auto_map" in given.config:
            found.append("config.json: auto_map names code that comes with the folder: it is not run here")
        shapes, wrong = _shapes(given.config)
        rows = given.config.get("vocab_size")
        if isinstance(rows, int) and (problem := rows_problem(rows, target.num_tokens)):
            found.append(f"config.json: {problem}")
        elif isinstance(rows, int) and rows != target.size("vocab_size"):
            notes.append(
                f"config.json: vocab_size is {rows}, the target {target.name} has {target.size('vocab_size')}: the same "
                "tokens with other padding; vLLM refuses that"
            )
        if wrong:
            return Imported(DrafterFiles("causal_lm", given.config, {}), [*found, *wrong], notes)
        given = without(given, [name for name in given.tensors if name.endswith(ANGLES)])
        if HEAD in given.tensors and HEAD not in shapes and EMBEDDING in given.tensors:
            if torch.equal(given.tensors[HEAD], given.tensors[EMBEDDING]):
                given = without(given, [HEAD])
                notes.append(f"{HEAD}: left out, it is tied to {EMBEDDING}")
            else:
                found.append(
                    f"{given.files[HEAD]}: {HEAD}: is not {EMBEDDING}, though tie_word_embeddings in config.json is true"
                )
                given = without(given, [HEAD])
        tensors, named = renamed(given, shapes, ours=str, theirs=str)
        return Imported(DrafterFiles("causal_lm", given.config, tensors), [*found, *named], notes)


def _shapes(config: Mapping[str, Any]) -> tuple[Shapes, list[str]]:
    """Return (names and shapes of the model that config.json describes, problems)."""
    try:
        return LAYOUTS["causal_lm"][0](config), []
    except Exception as error:  # each architecture checks its configuration in its own way
        said = " ".join(str(error).split())[:300]
        return {}, [f"config.json: transformers builds no causal LM from it: {type(error).__name__}: {said}"]
