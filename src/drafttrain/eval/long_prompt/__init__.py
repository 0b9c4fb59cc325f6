"""Long prompts: the target keeps only some of a prompt's keys, or reads only some of its tokens. LOSSY.

The kinds of choice are in `choices/`, one file each.
"""

from __future__ import annotations

from typing import Any, Protocol

from drafttrain.core.registry import Registry
from drafttrain.core.texts import Prompt
from drafttrain.eval.long_prompt.kept import Order
from drafttrain.eval.long_prompt.look_ahead import Models

prompt_choices = Registry("choice of a prompt's keys", "drafttrain.eval.long_prompt.choices")


class PromptChoice(Protocol):
    """Orders what the target could keep of a prompt, the most important first."""

    settings: Any

    def order(self, prompt: Prompt, models: Models) -> Order:
        """Return the order of a prompt's keys, or of its tokens. The target has read the prompt without its last token."""
        ...
