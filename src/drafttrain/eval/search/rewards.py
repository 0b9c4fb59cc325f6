"""Rewards of partial solutions: a process reward model that is a Hugging Face sequence classifier, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.tokenizer import load_tokenizer

Reward = Callable[[str, Sequence[str]], Sequence[float]]
"""Gets a prompt and texts that continue it by whole steps; returns for each how likely its last step leads to the answer, 0 to 1."""


class ClassifierReward:
    """The probability that a sequence classifier gives to a prompt with its partial solution.

    Args:
        model: A classifier of one label (its sigmoid counts) or of two (the second one counts).
        tokenizer: Of the classifier, which need not be the target's.
        name: For errors.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        if model.config.num_labels not in (1, 2):
            raise CheckpointError(
                f"{name}: a reward has one label or two, this classifier has {model.config.num_labels}"
            )
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer
        self.num_tokens = 0
        """Tokens that it has read."""

    @classmethod
    def load(cls, folder: str, *, device: str = "auto") -> ClassifierReward:
        """Load a classifier from its folder or hub id.

        Raises:
            CheckpointError: There is none.
        """
        from transformers import AutoModelForSequenceClassification

        path: Path = resolve_folder(folder)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: is no sequence classifier: {error}") from error
        return cls(model.to(pick_device(device)), load_tokenizer(path), name=folder)

    @torch.no_grad()
    def __call__(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """Return the reward of each text. They are read one at a time: classifiers differ in how they pad."""
        return [self._of(prompt + text) for text in texts]

    def _of(self, text: str) -> float:
        tokens_1T = torch.tensor([self._tokenizer(text)["input_ids"]], device=self._model.device)
        self.num_tokens += tokens_1T.shape[1]
        logits_K = self._model(input_ids=tokens_1T).logits[0].float()
        return float(logits_K.sigmoid()[0] if len(logits_K) == 1 else logits_K.softmax(-1)[1])


def checked(rewards: Sequence[float], count: int) -> list[float]:
    """Return rewards as given.

    Raises:
        DataError: There are too few or too many, or one is not in 0..1.
    """
    found = [float(one) for one in rewards]
    if len(found) != count:
        raise DataError(f"the reward returned {len(found)} values for {count} texts")
    if wrong := [one for one in found if not 0 <= one <= 1]:
        raise DataError(f"a reward is a probability, 0 to 1, got {wrong[0]:g}")
    return found
