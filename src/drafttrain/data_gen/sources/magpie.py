"""Questions that the target wrote itself: its chat template opens a user's turn, and the target continues it.

Source: Xu et al. 2024, "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing", arXiv 2406.08464.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources import Item, WeightedSettings, sources
from drafttrain.data_gen.sources.generated import Generated, GeneratedSettings


@dataclass(kw_only=True)
class MagpieSettings(WeightedSettings):
    """Questions that the target writes itself after its chat template's opening of a user's turn (Xu et al. 2024)."""

    number: int = setting(
        1000,
        help="Texts to sample. Those that do not end, are empty or repeat an earlier question are no prompts.",
        ge=1,
    )
    temperature: float = setting(1.0, help="Temperature of the questions.", gt=0)
    top_p: float = setting(1.0, help="Nucleus sampling of the questions.", gt=0, le=1)
    max_tokens: int = setting(128, help="Most tokens of a question; a longer text is no prompt.", ge=1)
    path: str | None = setting(None, help="Folder of questions that another run wrote; null: the target writes them.")
    max_lost_share: float = setting(
        1.0, help="Share of the texts that may be no prompts; more stop the run.", ge=0, le=1
    )


@sources.register("magpie", MagpieSettings)
class Magpie:
    """The questions of a folder of shards."""

    def __init__(self, settings: MagpieSettings) -> None:
        if settings.path is None:
            raise DataError("source magpie: the target writes questions for data.generate.prompts only")
        self._shards = Generated(GeneratedSettings(path=settings.path))
        self._seen: set[str] = set()

    def items(self) -> Iterator[Item]:
        """Yield every text."""
        yield from self._shards.items()

    def prompts(self, item: Item, encoder: Encoder) -> list[tuple[str, list[int]]]:
        """Return the question of a text as a prompt.

        Raises:
            BadItem: It is none.
        """
        words = _words(item.value, encoder)
        compared = " ".join(words.casefold().split())
        if compared in self._seen:
            raise BadItem("repeated: an earlier question is equal")
        self._seen.add(compared)
        id = str(item.value["id"]).replace("question", "magpie")
        return encoder.prompts({"question": words}, id=id, prompt_tokens=None)

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return self._shards.version()


def _words(value: dict[str, Any], encoder: Encoder) -> str:
    """Return the text up to the mark that ends a user's turn."""
    written = [token for token, new in zip(value["tokens"], value["loss_mask"], strict=True) if new]
    mark = encoder.decoded(encoder.template.around_question[1]).strip()
    words, ended, _ = encoder.decoded(written).partition(mark) if mark else ("", "", "")
    if not ended:
        raise BadItem("unfinished: the user's turn does not end")
    if not words.strip():
        raise BadItem("empty: the user's turn has no words")
    if encoder.raw.has_special(words):
        raise BadItem("special: a special token stands inside the question")
    return words.strip()
