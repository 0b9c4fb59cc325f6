"""A recipe as YAML with every default, and optionally with a comment that explains each key."""

import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import yaml

from drafttrain.config.fields import fields_of, kind_of
from drafttrain.config.recipe import Recipe

MAX_LINE = 120


def dump_recipe(recipe: Recipe, *, comments: bool = False) -> str:
    """Return YAML that loads to an equal recipe.

    Args:
        comments: Explain each key in a comment.
    """
    lines = list(_settings_lines(recipe, comments=comments))
    return "".join(f"{line}\n" for line in _with_gaps(lines))


def differences(before: Recipe, now: Recipe) -> list[str]:
    """Return a line for each key whose value differs."""
    held, wanted = (dict(_leaves(plain(one))) for one in (before, now))
    keys = [key for key in {**held, **wanted} if held.get(key, ABSENT) != wanted.get(key, ABSENT)]
    return [f"{key}: {_shown(held, key)} there, {_shown(wanted, key)} here" for key in keys]


ABSENT = object()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of everything that is no mapping and no list of mappings."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for name, part in value.items():
        yield from _leaves(part, f"{path}.{name}" if path else name)


def _shown(values: dict[str, Any], key: str) -> str:
    return _flow(values[key]) if key in values else "absent"


def plain(value: Any) -> Any:
    """Return settings as mappings, lists and scalars, with `kind` first if there is one."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    kind = {"kind": kind_of(value)} if kind_of(value) else {}
    return kind | {name: plain(getattr(value, name)) for name in fields_of(type(value))}


def _settings_lines(settings: Any, *, comments: bool) -> Iterator[str]:
    """Yield the lines of one settings dataclass, not indented."""
    if kind_of(settings):
        yield f"kind: {kind_of(settings)}"
    for name, field in fields_of(type(settings)).items():
        value = getattr(settings, name)
        yield from _entry_lines(name, value, comment=field.help if comments else "", comments=comments)


def _entry_lines(name: str, value: Any, *, comment: str, comments: bool) -> Iterator[str]:
    """Yield `name: value`, on several lines if the value consists of settings."""
    note = f"# {comment}" if comment else ""
    if is_dataclass(value) and not fields_of(type(value)) and not kind_of(value):
        yield f"{name}: {{}}  {note}".rstrip()
    elif is_dataclass(value):
        yield f"{name}:  {note}".rstrip()
        yield from (f"  {line}" for line in _settings_lines(value, comments=comments))
    elif isinstance(value, list) and any(map(is_dataclass, value)):
        yield f"{name}:  {note}".rstrip()
        for item in value:
            first, *rest = _settings_lines(item, comments=comments)
            yield from (f"  - {first}", *(f"    {line}" for line in rest))
    else:
        line = f"{name}: {_flow(plain(value))}"
        if note and len(line) + len(note) + 10 > MAX_LINE:
            yield note
            note = ""
        yield f"{line}  {note}".rstrip()


def _flow(value: Any, *, inside: bool = False) -> str:
    """Return a scalar, or a list or mapping of scalars, on one line; more text needs quotes `inside` brackets."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(str(k), inside=True)}: {_flow(v, inside=True)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item, inside=True) for item in value) + "]"
    if isinstance(value, str) and (not value.isprintable() or value != value.strip()):
        return json.dumps(value)
    if inside:
        return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 20).strip()[1:-1]
    return yaml.safe_dump(value, allow_unicode=True, width=1 << 20).removesuffix("...\n").strip()


def _with_gaps(lines: list[str]) -> Iterator[str]:
    """Put an empty line before and after every section of several lines."""
    was_inside = False
    for i, line in enumerate(lines):
        inside = line.startswith(" ")
        opens = not inside and i + 1 < len(lines) and lines[i + 1].startswith(" ")
        if i and (opens or (was_inside and not inside)):
            yield ""
        yield line
        was_inside = inside
