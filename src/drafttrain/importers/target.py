"""The target that an imported drafter is for: configuration, tokenizer, and single tensors, without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.export.layout import text_config
from drafttrain.export.target_weights import embedding_of, head_of
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.tokenizer import load_tokenizer, num_ids


@dataclass(frozen=True)
class TargetFiles:
    """A target's folder."""

    name: str
    folder: Path

    @classmethod
    def named(cls, name: str) -> TargetFiles:
        """Return the target of a name: a folder, a hub id, builtin:target."""
        return cls(name, resolve_folder(name))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the language model."""
        return dict(text_config(read_json(self.folder / "config.json")))

    def size(self, key: str) -> int:
        """Return a number of config.json.

        Raises:
            CheckpointError: It is not there.
        """
        value = self.config.get(self._called(key))
        if not isinstance(value, int):
            raise CheckpointError(f"{self.folder / 'config.json'}: {key} must be a whole number, got {value!r}")
        return value

    @property
    def num_positions(self) -> int | None:
        """Positions that config.json names; None: no end is named."""
        value = self.config.get(self._called("max_position_embeddings"))
        return value if isinstance(value, int) else None

    def _called(self, key: str) -> str:
        """Return the name that the architecture has for a field; GPT-2's hidden_size is n_embd."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = str(self.config.get("model_type"))
        names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
        return key if key in self.config else str(names.get(key, key))

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.folder)

    @property
    def num_tokens(self) -> int:
        """Ids that the tokenizer can produce and the model has rows for."""
        return min(self.size("vocab_size"), num_ids(self.tokenizer))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and weights."""
        return fingerprint_of(self.folder)

    @cached_property
    def embedding(self) -> Tensor | None:
        """The embedding; None where it goes by a name that is not known here."""
        return embedding_of(self.folder)

    @cached_property
    def head(self) -> Tensor | None:
        """The output matrix; the embedding where they are tied, which a configuration may leave to its architecture to say."""
        tied = self.config.get("tie_word_embeddings")
        own = None if tied else head_of(self.folder)
        return self.embedding if own is None and tied is not False else own
