"""The language model inside a multimodal model: drafters are trained on text, so the other parts are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.console import say_once


def wraps_language_model(config: Any) -> bool:
    """Return whether a configuration is of a model that contains a language model with its own class."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    return text is not config and type(text) in AutoModelForCausalLM._model_mapping


def contains_language_model(config: Any) -> bool:
    """Return whether a configuration is of a model around a language model, which may have no class with a head (Qwen2-VL)."""
    from transformers import AutoModel

    text = config.get_text_config()
    of_family = text.model_type == f"{config.model_type}_text" and type(text) in AutoModel._model_mapping
    return wraps_language_model(config) or (text is not config and of_family)


def auto_class_for(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return the auto class of transformers that loads a folder: as a causal LM, or as a multimodal model around one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    whole = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    able = [one for one in (AutoModelForCausalLM, *whole) if type(config) in one._model_mapping]
    return able[0] if able else AutoModelForCausalLM


def language_model_inside(model: Any, folder: Path) -> Any:
    """Return the language model of a multimodal model, with its head. Any other model is returned as it is."""
    if not contains_language_model(model.config):
        return model
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    config = decoder.config
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    inside = _with_own_class(decoder, head) if wraps_language_model(model.config) else _headed(decoder, head)
    inside.generation_config = model.generation_config
    inside.config._name_or_path = str(folder)
    say_once(f"{folder}: {type(model).__name__}: its language model, {type(inside).__name__}, is the target")
    return inside


def _with_own_class(decoder: Any, head: nn.Module) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        inside: Any = AutoModelForCausalLM.from_config(decoder.config)
    setattr(inside, inside.base_model_prefix, decoder)
    inside.set_output_embeddings(head)
    return inside


def _headed(decoder: Any, head: nn.Module) -> Any:
    """Return a causal LM of a decoder that transformers has no causal LM of (Qwen2-VL), in the manner of the decoder's family."""
    from transformers import GenerationMixin

    family = type(decoder).__mro__[1]
    return type(f"{type(decoder).__name__}WithHead", (_Headed, family, GenerationMixin), {})(decoder, head)


class _Headed:
    """A decoder with its head, as transformers' causal LMs are called."""

    base_model_prefix = "model"

    def __init__(self, decoder: Any, head: nn.Module) -> None:
        super().__init__(decoder.config)  # type: ignore[call-arg]
        self.model = decoder
        self.lm_head = head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> Any:
        """Return logits and the cache."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        return CausalLMOutputWithPast(logits=self.lm_head(read.last_hidden_state), past_key_values=read.past_key_values)
