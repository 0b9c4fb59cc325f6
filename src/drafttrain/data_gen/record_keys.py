"""The keys of a record: which form it has, which keys belong to that form, and which the target never reads.

Any other key may change what the target reads in an unknown way: the record is quarantined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from drafttrain.data_gen.bad_item import BadItem

FOR_TEMPLATE = ("system", "system_prompt", "tools", "functions", "documents", "chat_template_kwargs")
"""Keys beside the turns that the chat template reads."""
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
ANSWERS = {
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "prompt": ("completion", "response"),
}
"""By form: the keys that may hold its answer."""
IMAGES = "images"
"""Key beside any form but plain text: what its placeholders stand for."""
FORMS: dict[str, tuple[str, ...]] = {
    "messages": FOR_TEMPLATE,
    "conversations": FOR_TEMPLATE,
    "instruction": ("input", *ANSWERS["instruction"], "history", *FOR_TEMPLATE),
    "question": (*ANSWERS["question"], *FOR_TEMPLATE),
    "query": (*ANSWERS["query"], "history", *FOR_TEMPLATE),
    "turns": FOR_TEMPLATE,
    "prompt": (*ANSWERS["prompt"], "chat", *FOR_TEMPLATE),
    "text": (),
    "tokens": MASKS,
    "input_ids": ("labels", "attention_mask", *MASKS),
}
"""By the key that identifies a form: the other keys that it may have."""
KEYS = sorted({*FORMS, *(key for keys in FORMS.values() for key in keys), "id", "domain", IMAGES})
"""All keys of records that are read."""
METADATA = frozenset(
    """
    answer answers answer_id author canonical_solution category categories conversation_id conv_id count created created_at
    data_source dataset dataset_name date difficulty domain drawn_by entry_point errors finish_reason generator ground_truth
    hash id idx index label lang language length license max_tokens meta meta_data metadata model model_id model_name moderation name
    num_tokens num_turns openai_moderation origin parallel_tool_calls prompt_id quality question_id rating redacted reference
    request_id reward sampling score scores seed sha256 source special_tokens_mask split stream subset subject tags task task_id task_name task_type temperature test
    time timestamp title token_count token_type_ids top_k top_p topic toxic turn type uid url usage user user_id uuid version
    """.split()  # noqa: SIM905
)
"""Keys that describe a record; no target reads them."""


@dataclass(frozen=True)
class Reading:
    """How the records of one source are read."""

    rename: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    ignore_keys: Sequence[str] = ()
    chat: bool | None = None
    """Whether text under `prompt` is a user's message, in records that do not say it."""
    answers: str = "all"
    """Which answers of a chat are labels: all, or only the last."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, unless the record gives its own."""

    @classmethod
    def of(cls, settings: Any) -> Reading:
        """Return how the settings of a source or of a file of prompts read records; those without such settings: as they are."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(cls) if hasattr(settings, one.name)})

    def renamed(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with the keys that are known here; `data.messages` is the key messages inside the mapping data."""
        for old in self.rename.values():
            value = _opened(value, old)
        kept = {key: part for key, part in value.items() if key not in self.rename.values()}
        return kept | {new: value[old] for new, old in self.rename.items() if old in value}

    def without_ignored(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return a mapping without ignored keys and nulls."""
        return {key: part for key, part in value.items() if part is not None and key not in self.ignore_keys}


def form_of(value: Mapping[str, Any], reading: Reading) -> tuple[str, dict[str, Any]]:
    """Return the form of a record, and its keys with a value.

    Raises:
        BadItem: It has no known form, or two, or an unknown key.
    """
    found = reading.without_ignored(reading.renamed(value))
    forms = [form for form in FORMS if not _is_empty(found.get(form, ""))] or [form for form in FORMS if form in found]
    if "messages" in forms and _repeats(found.get("prompt"), found["messages"]):
        forms.remove("prompt")
        del found["prompt"]
    if not forms:
        missing = [old for old in reading.rename.values() if old not in value]
        batch = "; source kind openai_batch reads outputs of batch jobs" if "custom_id" in found else ""
        lacks = f"; rename names {', '.join(map(repr, missing))}, which it lacks" if missing else ""
        raise BadItem(f"no known form: has none of {', '.join(FORMS)}; its keys: {_listed(found)}{lacks}{batch}")
    if len(forms) > 1:
        raise BadItem(
            f"{' and '.join(forms)}: more than one text in one record; name those not to be read in ignore_keys of the source"
        )
    form = forms[0]
    for key, part in found.items():
        known = key in (form, IMAGES) or key in FORMS[form] or is_metadata(key)
        if not known and not _is_empty(part):
            raise BadItem(unknown(key))
    if form == "prompt" and reading.chat is not None and isinstance(found[form], str):
        found.setdefault("chat", reading.chat)
    return form, found


def is_metadata(key: str) -> bool:
    """Return whether no target reads a key."""
    name = key.rpartition(".")[2]
    return name in METADATA or name.startswith("_")


def unknown(key: str, where: str = "") -> str:
    """Return the message about an unknown key."""
    place = f" of {where}" if where else ""
    return f"unknown key {key!r}{place}: it may change what the target reads; if it does not, name it in ignore_keys of the source"


def _opened(value: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return a record with the keys of the mappings on a path at its top, as `data.messages`: each is read or refused by name."""
    for place in [place for place, letter in enumerate(path) if letter == "."]:
        inner = value.get(path[:place])
        if path not in value and isinstance(inner, Mapping):
            value = {key: part for key, part in value.items() if key != path[:place]}
            value |= {f"{path[:place]}.{key}": part for key, part in inner.items()}
    return value


def _repeats(prompt: Any, messages: Any) -> bool:
    """Return whether a prompt beside a chat is the chat's first question, as some data sets have it."""
    turns = messages if isinstance(messages, list) else []
    asked = [turn.get("content") for turn in turns if isinstance(turn, Mapping) and turn.get("role") == "user"]
    return isinstance(prompt, str) and asked[:1] == [prompt]


def _is_empty(part: Any) -> bool:
    return isinstance(part, str | list | dict) and not part


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, keys)) or "none"
