"""A tokenizer with ChatML tokens, templates for tests, and text with its labels marked."""

from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.record_keys import Reading
from tests.conftest import byte_tokenizer

ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS
BOS = "{{ bos_token }}" + CHATML
RICH = (
    "{%- if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }};{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{%- else %}{{ m.content }}{% endif %}<|im_end|>\n{%- endfor %}"
).replace("{%- endfor %}", "{% endfor %}") + ASKS
"""Reads tools, calls and thoughts."""
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{%- generation -%}{{ m['content'] }}"
    "<|im_end|>{%- endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
)


def chat_tokenizer(template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and the special tokens of ChatML."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    tokenizer.chat_template = template
    return tokenizer


def chat_encoder(template: str | None, *, bos: bool = False, max_length: int = 4000, **reading: Any) -> Encoder:
    """Return an encoder by that tokenizer."""
    return Encoder(chat_tokenizer(template, bos=bos), max_length, Reading(**reading))


def shown(encoder: Encoder, record: Record) -> str:
    """Return the text of a record with its labels in [[ ]]."""
    words, labelled = "", False
    spelled = encoder.tokenizer.convert_ids_to_tokens(list(record.tokens))
    run: list[str] = []

    def flush() -> str:
        return encoder.tokenizer.convert_tokens_to_string(run)

    for token, is_label in zip(spelled, record.loss_mask, strict=True):
        if is_label != labelled:
            words, run, labelled = words + flush() + ("[[" if is_label else "]]"), [], is_label
        run.append(token)
    return words + flush() + ("]]" if labelled else "")


def read(encoder: Encoder, value: Any) -> list[str]:
    """Return the records of an item with their labels in [[ ]]."""
    return [shown(encoder, record) for record in encoder.records(value, id="x")]
