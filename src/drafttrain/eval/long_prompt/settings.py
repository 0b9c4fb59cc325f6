"""Which choices a frontier compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drafttrain.core.settings import setting
from drafttrain.eval.long_prompt import prompt_choices
from drafttrain.eval.long_prompt.choices.at_random import AtRandomSettings
from drafttrain.eval.long_prompt.choices.last_window import LastWindowSettings
from drafttrain.eval.long_prompt.choices.speckv import SpecKVSettings
from drafttrain.eval.long_prompt.choices.specpc import SpecPCSettings
from drafttrain.eval.proposers import label_of


@dataclass
class LongPromptSettings:
    """What `drafttrain long-prompt` compares."""

    choices: list[Any] = setting(
        [
            *(SpecKVSettings(), SpecKVSettings(look_ahead_tokens=0), AtRandomSettings(), LastWindowSettings()),
            *(SpecPCSettings(), AtRandomSettings(of="tokens"), LastWindowSettings(of="tokens")),
        ],
        help="How the kept keys or tokens are chosen, by kind.",
        registry=prompt_choices,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        labels = [label_of(choice) for choice in self.choices]
        problems = [] if labels else ["choices: at least one is needed"]
        return problems + [f"choices: {one} occurs twice" for one in dict.fromkeys(labels) if labels.count(one) > 1]
