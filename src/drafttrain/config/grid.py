"""The grid of a sweep: axes with their values, and the arms that they make, one value of each axis.

An axis is written `train.lr=1e-4,3e-4`, or with names for its values in a YAML file: axis, name, overrides.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drafttrain.config.nodes import MAX_BYTES, Node, read_yaml
from drafttrain.core.printable import shortened

MOST_OF_VALUE, MOST_OF_NAME = 32, 120
"""Longest part of a folder's name for a value, and longest name of an arm."""

OWN_KEYS = {"seed": "give the seeds with --seeds 0,1", "name": "each arm gets a name of its own"}
"""Keys that cannot be an axis, and why."""


@dataclass(frozen=True)
class Choice:
    """One value of an axis."""

    name: str
    """The value as written, or its name in the grid file."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A key with its values, or a named group of overrides."""

    name: str
    choices: tuple[Choice, ...]
    key: str | None = None
    """None: of a grid file."""


@dataclass(frozen=True)
class Arm:
    """One combination of values, all seeds included."""

    name: str
    """Readable and stable: it holds the values, never their place in the grid."""
    settings: Mapping[str, str]
    """By axis: the value, or its name."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """All axes, and the overrides that all arms share."""

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...] = ()

    def arms(self) -> list[Arm]:
        """Return every combination; the values of the last axis change fastest."""
        arms = []
        for chosen in itertools.product(*(axis.choices for axis in self.axes)):
            settings = {axis.name: choice.name for axis, choice in zip(self.axes, chosen, strict=True)}
            overrides = (*self.fixed, *itertools.chain.from_iterable(choice.overrides for choice in chosen))
            arms.append(Arm(_arm_name(settings), settings, overrides))
        return arms


def read_grid(words: Sequence[str], file: Path | None = None) -> tuple[Grid, list[str]]:
    """Return the grid of `key=v1,v2` words and of a grid file, whose axes come first; and every problem of both.

    A word with one value is an override of all arms. Commas inside brackets or quotes belong to the value. What has a problem is
    left out of the grid, so that the rest can be checked too.

    Raises:
        RecipeError: The file is not YAML.
    """
    axes, problems = _axes_of(file) if file is not None else ([], [])
    given = dict[str, list[str]]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"{shortened(word)}: a word has the form section.key=v1,v2")
            continue
        try:
            values = split_values(text)
        except ValueError as error:
            problems.append(f"{shortened(word)}: {error}")
            continue
        problems += [f"{shortened(word)}: {problem}" for problem in _problems(key, values)]
        if key in given:
            problems.append(f"{key}: given twice; give all values at once")
        given[key] = list(dict.fromkeys(filter(None, values)))
    several = [key for key, values in given.items() if len(values) > 1 and key not in OWN_KEYS]
    names = _short_names(several)
    axes += [Axis(names[key], tuple(Choice(one, (f"{key}={one}",)) for one in given[key]), key) for key in several]
    same = [name for name, count in Counter(axis.name for axis in axes).items() if count > 1]
    problems += [f"{name}: two axes have this name" for name in same]
    if not axes and not problems:
        problems.append("no axis: give a key with two or more values, such as train.lr=1e-4,3e-4, or --grid FILE")
    fixed = tuple(f"{key}={values[0]}" for key, values in given.items() if len(values) == 1)
    return Grid(tuple(axes), fixed), problems


def split_values(text: str) -> list[str]:
    """Return the values between the commas of a text that are outside brackets and quotes.

    Raises:
        ValueError: Brackets or quotes do not match.
    """
    values, depth, quote, before = [""], 0, "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and before in ",[{: ":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if depth < 0:
            break
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
        before = character
    if depth or quote:
        raise ValueError("quotes do not match" if quote else "brackets do not match")
    return [value.strip() for value in values]


def _problems(key: str, values: Sequence[str]) -> Iterator[str]:
    if len(values) > 1 and key in OWN_KEYS:
        yield f"{key} cannot be an axis: {OWN_KEYS[key]}"
    if not all(values):
        yield 'empty value: remove the comma, or write "" for an empty text'
    for value, count in Counter(filter(None, values)).items():
        if count > 1:
            yield f"{shortened(value)} is given {count} times"


def _axes_of(file: Path) -> tuple[list[Axis], list[str]]:
    """Return the axes of a grid file, and its problems."""
    try:
        if file.stat().st_size > MAX_BYTES:
            return [], [f"{file}: a grid file has at most {MAX_BYTES:,} bytes"]
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return [], [f"{file}: not UTF-8: {error}"]
    except OSError as error:
        return [], [f"{file}: cannot be read: {error.strerror}"]
    root, found = read_yaml(text, source=str(file))
    problems = [f"{file}: {problem}" for problem in found]
    axes = []
    form = "a grid file has the form axis: {name: {section.key: value}}"
    for axis, names in _items(root):
        choices = []
        for name, overrides in _items(names):
            changes = tuple(f"{key}={json.dumps(node.plain())}" for key, node in _items(overrides))
            choices.append(Choice(name, changes))
            if not isinstance(overrides.value, dict):
                problems.append(f"{file}: {overrides.where}: {axis}: {name}: {form}")
            problems += [
                f"{file}: {node.where}: {key} cannot be in a grid: {OWN_KEYS[key]}"
                for key, node in _items(overrides)
                if key in OWN_KEYS
            ]
        if not choices:
            problems.append(f"{file}: {names.where}: {axis}: {form}")
        axes.append(Axis(axis, tuple(choices)))
    if not axes and not problems:
        problems.append(f"{file}: {form}")
    return axes, problems


def _items(node: Node) -> list[tuple[str, Node]]:
    return list(node.value.items()) if isinstance(node.value, dict) else []


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest end of each key that no other key has; `loss.kind` is `loss`."""
    parts = {key: key.removesuffix(".kind").split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        lengths = [n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others)]
        names[key] = ".".join(own[-min(lengths, default=len(own)) :])
    return names


def _arm_name(settings: Mapping[str, str]) -> str:
    name = "_".join(f"{_as_folder(axis)}-{_as_folder(value)}" for axis, value in settings.items())
    return name if len(name) <= MOST_OF_NAME else f"{name[:MOST_OF_NAME]}-{_digest(name)}"


def _as_folder(text: str) -> str:
    """Return a text as part of a folder's name; one that has to be changed also gets its digest."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")
    if plain == text and len(plain) <= MOST_OF_VALUE:
        return plain
    return f"{plain[:MOST_OF_VALUE].strip('-')}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:6]
