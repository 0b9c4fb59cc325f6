"""Small tokenizers that write the same text in different ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_level(merges: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return byte-level BPE: all bytes, then the results of these merges ("t h" in GPT-2's letters), then the end of text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), END]
    return _byte_level({token: id for id, token in enumerate(tokens)}, [tuple(merge.split()) for merge in merges])


def sentence_pieces(pieces: Sequence[str], *, end: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer in SentencePiece's form: the end of text, lone bytes, then these pieces; it puts a space before a text."""
    tokens = [end, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [
        (piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)) if _both(pieces, piece, cut)
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges=merges, byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)


def _both(pieces: Sequence[str], piece: str, cut: int) -> bool:
    return {piece[:cut], piece[cut:]} <= set(pieces)


def letters(words: Sequence[str], *, order: Sequence[int] | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of a few ASCII tokens: the end of text, single letters, pairs that are joined of two letters.

    Args:
        order: The id of each of them, instead of its place.
    """
    tokens = [END, *words]
    vocabulary = dict(zip(tokens, order or range(len(tokens)), strict=True))
    return _byte_level(vocabulary, [(word[0], word[1]) for word in words if len(word) == 2])


def permuted(model: Any, order: Sequence[int]) -> Any:
    """Return a copy of a tied model whose token `i` has the id `order[i]`."""
    changed = copy.deepcopy(model)
    rows_V = torch.empty(len(order), dtype=torch.long)
    rows_V[list(order)] = torch.arange(len(order))
    with torch.no_grad():
        changed.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[rows_V])
    return changed


def _byte_level(vocabulary: dict[str, int], merges: list[Any]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
