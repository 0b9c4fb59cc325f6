"""The tokens that end a text: the union of those in the generation config, the configuration and the tokenizer.

vLLM stops at the end tokens of generation_config.json (or config.json if that file is missing) and of the tokenizer. A text
that continues after one of them cannot come from it. All code that needs end tokens uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drafttrain.core.console import say_once
from drafttrain.core.foreign import read_json

GENERATION, CONFIGURATION, TOKENIZER = "generation config", "configuration", "tokenizer"


def ends_by_place(model: Any, tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Return the end tokens by the place that names them. Places without any are left out.

    Args:
        model: None if there is only a tokenizer.
    """
    places: dict[str, Any] = {}
    if model is not None:
        places[GENERATION] = getattr(model.generation_config, "eos_token_id", None)
        places[CONFIGURATION] = _named_in(model.config)
    places[TOKENIZER] = tokenizer.eos_token_id
    return {place: ids for place, given in places.items() if (ids := _ids(given))}


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text: those of the generation config first, then those of other places."""
    return _union(ends_by_place(model, tokenizer).values())


def end_of_text_id(tokenizer: Any) -> int | None:
    """Return the id to append to a text without an end token: the tokenizer's own."""
    ids = _ids(tokenizer.eos_token_id)
    return ids[0] if ids else None


def report_end_tokens(model: Any, tokenizer: Any, *, name: str) -> None:
    """Log one line if the places name different end tokens."""
    places = ends_by_place(model, tokenizer)
    if len({frozenset(ids) for ids in places.values()}) > 1:
        say_once(f"{name}: {_in_words(places, tokenizer)}: a text ends at any of them, as in engines")


def _named_in(config: Any) -> Any:
    """Return the end tokens that a configuration names itself, without its class's defaults."""
    file = Path(config.name_or_path) / "config.json"
    if not config.name_or_path or not file.is_file():
        return config.get_text_config().to_diff_dict().get("eos_token_id")
    named = read_json(file)
    inside = named.get("text_config")
    return named.get("eos_token_id", inside.get("eos_token_id") if isinstance(inside, Mapping) else None)


def _ids(given: Any) -> tuple[int, ...]:
    listed = given if isinstance(given, list | tuple) else [given]
    # Some configurations use -1 for no end token.
    return tuple(one for one in listed if type(one) is int and 0 <= one < 1 << 31)


def _union(groups: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(one for group in groups for one in group))


def _in_words(places: Mapping[str, Iterable[int]], tokenizer: Any) -> str:
    def token(one: int) -> str:
        return f"{one} ({tokenizer.convert_ids_to_tokens(one)})"

    return "; ".join(f"{place} ends texts at {', '.join(map(token, ids))}" for place, ids in places.items())
