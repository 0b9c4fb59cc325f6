"""Models of the sizes in a config.json, without weights: what a training costs is counted before anything large is loaded.

They are made where new tensors have no data (`torch._subclasses.FakeTensorMode`).
"""

from __future__ import annotations

import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder
from drafttrain.target_model.documents import assume_plain
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.folders import config_folder
from drafttrain.target_model.mimo import register_mimo
from drafttrain.target_model.number_type import HALF_TYPES, MANY
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target
from drafttrain.target_model.tokenizer import load_tokenizer, tokenizer_files


class NoTokenizer:
    """A tokenizer without tokens that begin, end or pad texts."""

    bos_token_id = eos_token_id = pad_token_id = None


class SizedTarget(Target):
    """A target without weights and, if its folder holds none, without a tokenizer: then every row of its head is a token."""

    @classmethod
    def of(cls, settings: TargetSettings, *, device_type: str) -> SizedTarget:
        """Return the target of these settings. Of a hub id only config.json is fetched.

        Args:
            device_type: The device that will hold it: `dtype: auto` depends on it.

        Raises:
            CheckpointError: There is no config.json, or it describes no causal LM.
        """
        assert settings.model is not None, "the caller refuses a recipe without a target"
        trust = settings.trust_remote_code
        config, folder = read_sizes(settings.model, revision=settings.revision, trust_remote_code=trust)
        build = partial(sized_model, config, attention=settings.attention, trust_remote_code=trust)
        stored = str(config.dtype or torch.float32).removeprefix("torch.")
        dtype = stored if settings.dtype == "stored" else settings.dtype
        if dtype == "auto":
            halved = device_type != "cpu" and sum(p.numel() for p in build("float32").parameters()) > MANY
            dtype = (stored if stored in HALF_TYPES.values() else "bfloat16") if halved else "float32"
        has_tokenizer = settings.tokenizer is None and tokenizer_files(folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust) if has_tokenizer else NoTokenizer()
        model = build(dtype)
        assume_plain(model)
        made = cls(model, tokenizer, name=settings.model, fingerprint="")
        made.reads_images = settings.images
        return made

    reads_images = False

    @property
    def visual_id(self) -> int | None:
        """Some token: which one it is does not change what a training costs."""
        return 0 if self.reads_images else None

    @cached_property
    def num_tokens(self) -> int:
        """Ids that the tokenizer can produce; without one, the rows of the head."""
        return self.vocab_size if isinstance(self.tokenizer, NoTokenizer) else super().num_tokens

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """None: no text is read."""
        return ()


def read_sizes(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Path]:
    """Return the configuration of the language model of a folder, builtin name or hub id, and the folder.

    Raises:
        CheckpointError: There is no config.json, it cannot be read, or it describes a quantized model.
    """
    from transformers import AutoConfig

    folder = config_folder(name, revision=revision)
    check_folder(folder)
    register_mimo()
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the configuration's class raises for its fields
        raise CheckpointError(f"{folder}/config.json: {in_one_line(error)}") from error
    text = config.get_text_config()
    if any(getattr(one, "quantization_config", None) is not None for one in (config, text)):
        raise CheckpointError(
            f"{folder}/config.json: describes quantized weights, whose bytes do not follow from it. Name the config.json of the "
            "model before it was quantized"
        )
    text.dtype = text.dtype or config.dtype
    return text, folder


def sized_model(config: Any, dtype: str, *, attention: str | None = "sdpa", trust_remote_code: bool = False) -> Any:
    """Return the causal LM of a configuration.

    Raises:
        CheckpointError: It describes no causal LM.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # broken configurations raise anything
        raise CheckpointError(
            f"{config._name_or_path}/config.json: cannot build a causal LM from it: {in_one_line(error)}"
        ) from error
