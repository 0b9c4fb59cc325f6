"""The built-in backend: what it reads of the vocabulary, and what it reports while it writes."""

from typing import Any

import pytest

from drafttrain.core.console import Progress
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import TokenCount, continuations
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama


class CountedVocabulary:
    """A tokenizer that counts how often its whole vocabulary is read."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.reads = 0

    def get_vocab(self) -> dict[str, int]:
        self.reads += 1
        return self.tokenizer.get_vocab()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_vocabulary_is_read_once_however_many_tokens_are_written(temperature):
    tokenizer = CountedVocabulary()
    target = Target(random_llama(hidden_size=16), tokenizer, name="t", fingerprint="")
    counts: list[int] = []
    task = Task("a", [5, 6, 7], Sampling(temperature))
    (text,) = continuations([task], target, max_new_tokens=12, seed=0, written=counts.append)
    assert len(text) > 3
    assert tokenizer.reads <= 1
    assert sum(counts) == len(text), "every token is reported"


def test_tokens_are_noted_before_a_text_is_done():
    bar = Progress("generating", 4, "texts")
    count = TokenCount(bar, max_new_tokens=50)
    count(3)
    assert "3 tokens" in bar.status()
    assert "at most" in bar.status(), "no text is done yet: the longest time left"
