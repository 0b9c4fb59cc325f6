"""A drafter that starts from random weights: a Llama of given sizes."""

from __future__ import annotations

from typing import Any, Protocol

from drafttrain.target_model.end_tokens import end_of_text_id
from drafttrain.target_model.positions import UNLIMITED_POSITIONS


class Sizes(Protocol):
    """The sizes of a model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int | None
    num_heads: int
    num_kv_heads: int | None


def default_width(hidden_size: int) -> int:
    """Return the feed-forward width of a drafter from scratch for which none is given."""
    return 8 * round(hidden_size / 3)


def scratch_llama(settings: Sizes, *, vocab_size: int, num_positions: int | None, tokenizer: Any) -> Any:
    """Return a random Llama of the size that the settings give.

    Args:
        num_positions: The target's: engines stop drafting at the drafter's own limit. None: the tokenizer's, if it has one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    num_positions = num_positions or int(min(tokenizer.model_max_length, UNLIMITED_POSITIONS))
    width = settings.intermediate_size or default_width(settings.hidden_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads or settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=num_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_text_id(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
