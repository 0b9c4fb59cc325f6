"""The language model inside a multimodal model: drafters are trained on text, so the other parts are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drafttrain.core.console import say_once


def wraps_language_model(config: Any) -> bool:
    """Return whether a configuration is of a model that contains a language model with its own class."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    return text is not config and type(text) in AutoModelForCausalLM._model_mapping


def auto_class_for(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return the auto class of transformers that loads a folder: as a causal LM, or as a multimodal model around one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    whole = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    able = [one for one in (AutoModelForCausalLM, *whole) if type(config) in one._model_mapping]
    return able[0] if able else AutoModelForCausalLM


def language_model_inside(model: Any, folder: Path) -> Any:
    """Return the language model of a multimodal model, with its head. Any other model is returned as it is."""
    from transformers import AutoModelForCausalLM

    if not wraps_language_model(model.config):
        return model
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    config = decoder.config
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        inside: Any = AutoModelForCausalLM.from_config(config)
    setattr(inside, inside.base_model_prefix, decoder)
    inside.set_output_embeddings(head)
    inside.generation_config = model.generation_config
    inside.config._name_or_path = str(folder)
    say_once(f"{folder}: {type(model).__name__}: its language model, {type(inside).__name__}, is the target")
    return inside
