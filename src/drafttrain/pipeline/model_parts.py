"""A model without its weights: folder, configuration and tokenizer, each read when it is first needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drafttrain.config.made_by import MADE_BY
from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.folder_checks import check_causal_lm, in_one_line
from drafttrain.target_model.folders import cached_folder, resolve_folder
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.mimo import register_mimo
from drafttrain.target_model.positions import position_limit
from drafttrain.target_model.tokenizer import load_tokenizer, num_ids


class NotHere(Exception):
    """A model that is not on this machine yet: it is on the hub, or another recipe makes it."""


class ModelParts:
    """The parts of a model, by its name.

    Args:
        key: Key of the recipe that names the model.
        fetch: Download the model from the hub if it is not on this machine.
    """

    def __init__(
        self,
        key: str,
        name: str,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        images: bool = False,
        fetch: bool = True,
    ) -> None:
        self.key = key
        self.name = name
        self._revision = revision
        self._tokenizer = tokenizer
        self._trust = trust_remote_code
        self._images = images
        self._fetch = fetch

    @cached_property
    def folder(self) -> Path:
        """The folder of the model."""
        return self._folder_of(self.name, self._revision)

    @cached_property
    def config(self) -> Any:
        """Configuration of the language model.

        Raises:
            CheckpointError: transformers cannot read the configuration.
        """
        register_mimo()
        try:
            config: Any = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self._trust)
        except Exception as error:  # whatever the configuration's class raises for its fields
            raise CheckpointError(f"{self.folder}/config.json: {in_one_line(error)}") from error
        return config.get_text_config()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer_folder, trust_remote_code=self._trust)

    @cached_property
    def images(self) -> ImageReader | None:
        """The reader of images; None: `target.images` is false."""
        folder = self.tokenizer_folder
        return ImageReader.of_folder(folder, trust_remote_code=self._trust) if self._images else None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer."""
        return self._folder_of(self._tokenizer, None) if self._tokenizer else self.folder

    @cached_property
    def num_ids(self) -> int:
        """Number of token ids of the tokenizer."""
        return num_ids(self.tokenizer)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config.vocab_size)

    @property
    def learnt_positions(self) -> int | None:
        """Number of learned position embeddings; None if positions are computed, or if the model cannot be built."""
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self._trust)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError):
            # The stage that loads the model reports the reason.
            return None
        return position_limit(model)

    def check_causal_lm(self) -> None:
        """Refuse a model that is not a causal LM.

        Raises:
            CheckpointError: Naming what the model is.
        """
        check_causal_lm(self.folder, trust_remote_code=self._trust)

    def _folder_of(self, name: str, revision: str | None) -> Path:
        if name.startswith(MADE_BY):
            raise NotHere(name)
        if self._fetch:
            return resolve_folder(name, revision=revision)
        folder = cached_folder(name, revision=revision)
        if folder is None:
            raise NotHere(name)
        return folder


def target_parts(settings: Any, *, fetch: bool = True) -> ModelParts:
    """Return the parts of a target."""
    return ModelParts(
        "target.model",
        settings.model,
        revision=settings.revision,
        tokenizer=settings.tokenizer,
        trust_remote_code=settings.trust_remote_code,
        images=settings.images,
        fetch=fetch,
    )
