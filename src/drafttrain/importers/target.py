"""The target of an imported drafter: configuration, tokenizer and single tensors, without loading the model."""

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
        """Return the target by its name: a folder, a hub id or builtin:target."""
        return cls(name, resolve_folder(name))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the language model."""
        return dict(text_config(read_json(self.folder / "config.json")))

    def size(self, key: str) -> int:
        """Return a number of config.json.

        Raises:
            CheckpointError: It is missing or not an integer.
        """
        value = self.config.get(self._own_name(key))
        if not isinstance(value, int):
            raise CheckpointError(f"{self.folder / 'config.json'}: {key} must be a whole number, got {value!r}")
        return value

    @property
    def num_positions(self) -> int | None:
        """Maximum number of positions in config.json; None: it has no limit."""
        value = self.config.get(self._own_name("max_position_embeddings"))
        return value if isinstance(value, int) else None

    def _own_name(self, key: str) -> str:
        """Return the architecture's name for a field; GPT-2's hidden_size is n_embd."""
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
        """Number of ids that the tokenizer can produce and the model has rows for."""
        return min(self.size("vocab_size"), num_ids(self.tokenizer))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and weights."""
        return fingerprint_of(self.folder)

    @cached_property
    def embedding(self) -> Tensor | None:
        """The embedding; None if it has no known name."""
        return embedding_of(self.folder)

    @cached_property
    def head(self) -> Tensor | None:
        """The output matrix; the embedding if they are tied, which some configurations leave to the default of the architecture."""
        tied = self.config.get("tie_word_embeddings")
        own = None if tied else head_of(self.folder)
        return self.embedding if own is None and tied is not False else own
