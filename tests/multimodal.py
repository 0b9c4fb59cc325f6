"""Tiny random targets that read images, in the shapes of LLaVA, Qwen2-VL and Gemma 3, with processors of transformers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from drafttrain.core.images import Image
from drafttrain.target_model.image_reader import for_images

END, IMAGE, BEGIN, STOP = "<|end|>", "<image>", "<boi>", "<eoi>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' }}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}PLACEHOLDER{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A chat template that reads parts, as those of multimodal models do."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SHAPES = ("llava", "qwen2_vl", "gemma3")


def tokenizer(placeholder: str) -> PreTrainedTokenizerFast:
    """Return bytes, then the special tokens of a target that reads images."""
    bytes_ = {token: id for id, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(bytes_, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in (END, IMAGE, BEGIN, STOP)])
    named = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": STOP}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=named,
        chat_template=TEMPLATE.replace("PLACEHOLDER", placeholder),
    )


def write_target(folder: Path, shape: str, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a random target with its processor; return the folder."""
    torch.manual_seed(seed)
    model, processor = _MADE[shape](SIZES | sizes)
    # Whatever is drawn as zeros in a new model must count: biases, and the scales of norms.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            elif "vision" in name or "visual" in name or "projector" in name:
                weight.normal_(std=0.3)
        # A target does not write image tokens.
        model.get_output_embeddings().weight[257:] = 0
    model.generation_config.eos_token_id = 256
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, *, width: int = 28, height: int = 28) -> bytes:
    """Return a random picture as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    written = io.BytesIO()
    Picture.fromarray(pixels).save(written, format="PNG")
    return written.getvalue()


def image(seed: int, *, width: int = 28, height: int = 28) -> Image:
    """Return a random image."""
    return Image.of_bytes(picture(seed, width=width, height=height))


def _llava(sizes: dict[str, Any]) -> tuple[Any, Any]:
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes),
        vision_config={"model_type": "clip_vision_model", **TOWER},
        image_token_index=257,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer(IMAGE),
        patch_size=7,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen2_vl(sizes: dict[str, Any]) -> tuple[Any, Any]:
    config = Qwen2VLConfig(
        text_config={**sizes, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": sizes["hidden_size"],
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
        },
        image_token_id=257,
        vision_start_token_id=258,
        vision_end_token_id=259,
        bos_token_id=None,
        eos_token_id=256,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 16}
    )
    return Qwen2VLForConditionalGeneration(config), for_images(Qwen2VLProcessor)(
        images, tokenizer(f"{BEGIN}{IMAGE}{STOP}")
    )


def _gemma3(sizes: dict[str, Any]) -> tuple[Any, Any]:
    config = Gemma3Config(
        text_config={
            **sizes,
            "tie_word_embeddings": False,
            "head_dim": 8,
            "sliding_window": 256,
            "query_pre_attn_scalar": 8,
        },
        vision_config=TOWER,
        tie_word_embeddings=False,
        mm_tokens_per_image=4,
        image_token_index=257,
        boi_token_index=258,
        eoi_token_index=259,
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(images, tokenizer(BEGIN), image_seq_length=4)


_MADE: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
}
