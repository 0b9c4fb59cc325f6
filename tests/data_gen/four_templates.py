"""Four chat templates in the manner of real ones, tokenizers that have them, and how each writes an answer."""

import json
from dataclasses import dataclass
from typing import Any

from tests.conftest import byte_tokenizer
from tests.data_gen.chats import RICH

LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{% if m.tool_calls %}<|python_tag|>{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{% endfor %}<|eom_id|>{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Calls end with another token than answers; marks for both."""
THINKING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The last answer has a thought, empty or not; earlier ones have none, so chats of several answers are rewritten."""
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, and there is no system role') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
    "<end_of_turn>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Template:
    """A template, its special tokens, and what it puts around the target's words."""

    source: str
    specials: tuple[str, ...]
    end: str
    call: tuple[str, str] | None
    """Before and after a call; None: it does not read calls."""
    arguments: dict[str, Any]
    """chat_template_kwargs for answers without thoughts."""

    def tokenizer(self) -> Any:
        """Return a tokenizer of bytes with this template."""
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": self.end})
        tokenizer.add_special_tokens({"additional_special_tokens": [*self.specials]})
        tokenizer.chat_template = self.source
        return tokenizer

    def written(self, content: str) -> str:
        """Return what the target writes for an answer of text."""
        return (content.strip() if self.source == GEMMA else content) + self.end

    def called(self, call: str) -> str:
        """Return what the target writes for a call, given as JSON."""
        assert self.call is not None
        before, after = self.call
        return before + json.dumps(json.loads(call), ensure_ascii=False) + after


TEMPLATES = {
    "llama": Template(
        LLAMA,
        ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>"),
        "<|eot_id|>",
        ("<|python_tag|>", "<|eom_id|>"),
        {},
    ),
    "thinking": Template(
        THINKING, ("<|im_start|>",), "<|im_end|>", ("<tool_call>", "</tool_call><|im_end|>"), {"enable_thinking": False}
    ),
    "gemma": Template(GEMMA, ("<start_of_turn>",), "<end_of_turn>", None, {}),
    "unmarked": Template(RICH, ("<|im_start|>",), "<|im_end|>", ("<call>", "</call><|im_end|>"), {}),
}
