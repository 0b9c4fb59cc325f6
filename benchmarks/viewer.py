"""Makes builtin:viewer, a LLaVA of a hundred thousand weights that says what four coloured squares show.

    python benchmarks/viewer.py src/drafttrain/builtin/viewer src/drafttrain/eval/prompts_data

About a minute on one core. Also writes the held-out prompts builtin:squares and builtin:squares_validation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources.squares import PLACEHOLDER, SIDE, VOCABULARY, Squares, SquaresSettings
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.vision import Vision

END = "<|end|>"
STEPS, BATCH, PEAK = 320, 24, 4e-3
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 2 * SIDE,
    "patch_size": SIDE // 2,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one token a word of the task."""
    words = list(dict.fromkeys([END, PLACEHOLDER, *VOCABULARY]))
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (END, PLACEHOLDER)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def model(num_tokens: int) -> LlavaForConditionalGeneration:
    """Return an untrained model."""
    text = LlamaConfig(
        **SIZES, vocab_size=num_tokens, bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False
    )
    config = LlavaConfig(text_config=text, vision_config=TOWER, image_token_index=1, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor of the model."""
    side = 2 * SIDE
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    settings: dict[str, Any] = {"image_token": PLACEHOLDER, "num_additional_image_tokens": 1}
    return LlavaProcessor(
        images, words, patch_size=TOWER["patch_size"], vision_feature_select_strategy="default", **settings
    )


def records(encoder: Encoder, **settings: Any) -> list[Record]:
    """Return the records of a source."""
    items = Squares(SquaresSettings(**settings)).items()
    return [record for item in items for record in encoder.records(item.value, id=item.where)]


def loss_of(vision: Vision, chosen: list[Record]) -> torch.Tensor:
    """Return the mean cross-entropy of the labels."""
    texts = [list(record.tokens) for record in chosen]
    width = max(map(len, texts))
    labels_BT = torch.tensor(
        [
            [token if label else -100 for token, label in zip(one.tokens, one.loss_mask, strict=True)]
            + [-100] * (width - len(one.tokens))
            for one in chosen
        ]
    )
    images = [one.images for one in chosen]
    arguments = vision.arguments(texts, images, device=torch.device("cpu"))
    logits_BTV = vision.whole(**arguments, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())


def main(folder: Path, prompts: Path) -> None:
    """Train the model, and write it and the prompts."""
    torch.manual_seed(0)
    words = tokenizer()
    whole, reader = model(len(words)), ImageReader(processor(words))
    vision = Vision(whole, reader)
    whole.requires_grad_(True).train()
    encoder = Encoder(words, 128, images=reader)
    seen, told = records(encoder, num_records=2000, seed=1), records(encoder, num_records=2000, seed=1, images=False)
    held_out = records(encoder, num_records=64, seed=2, split="held_out")
    optimizer = torch.optim.AdamW(whole.parameters(), lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=STEPS)
    draws = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        chosen = [of[int(torch.randint(len(of), (1,), generator=draws))] for of in [seen, told] * (BATCH // 2)]
        loss = loss_of(vision, chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            with torch.no_grad():
                print(
                    f"step {step + 1}: loss {loss:.3f}, held-out pictures {loss_of(vision, held_out):.3f}", flush=True
                )
    whole.eval().to(torch.bfloat16).save_pretrained(folder)
    reader._processor.save_pretrained(folder)
    for name, seed in (("squares", 3), ("squares_validation", 4)):
        found = Squares(SquaresSettings(num_records=48, seed=seed, split="held_out")).items()
        lines = [{key: item.value[key] for key in ("id", "prompt", "images")} for item in found]
        (prompts / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
