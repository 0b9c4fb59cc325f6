"""YAML text as a tree of values, each with the line that it comes from."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from drafttrain.core.errors import RecipeError
from drafttrain.core.printable import shortened

PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
MAX_BYTES = 200_000
"""Size limit of a recipe: the YAML reader needs a second for more. The longest bundled recipe has 4,000 bytes."""
MAX_DEPTH = 32
"""Limit of nested values. A recipe needs six levels."""


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe, and its place."""

    where: str
    """`line 5`, `override train.lr=2`, or empty."""
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text

    @property
    def order(self) -> tuple[int, int]:
        """The order of reports: by line, then problems without a line."""
        word, _, number = self.where.partition(" ")
        return (0, int(number)) if word == "line" else (1, 0)


@dataclass
class Node:
    """A value of a recipe: a scalar, a mapping of nodes or a list of nodes."""

    value: Any
    where: str
    """The line of its key (in a list, of the item), or the override that set it."""
    text: str | None = None
    """A scalar as written."""
    refused: bool = False
    """A problem with the value is reported already, so the value is not used."""

    def plain(self) -> Any:
        """Return the value as plain mappings, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def read_yaml(text: str, *, source: str) -> tuple[Node, list[Problem]]:
    """Return the tree of a YAML text, and what a recipe must not contain: duplicate keys, anchors, aliases, merge keys.

    Raises:
        RecipeError: The text is not YAML, or nested too deep.
    """
    try:
        root, problems = _tree_of(text, where="line 1")
    except _TooDeepError as error:
        raise RecipeError(source, [f"{_line(error)}: values nested deeper than {MAX_DEPTH} levels"]) from error
    except yaml.reader.ReaderError as error:
        at = f"line {1 + text.count(chr(10), 0, error.position)}"
        raise RecipeError(
            source, [f"{at}: not YAML: character U+{ord(text[error.position]):04X} is not allowed"]
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(source, [f"{line}not YAML: {shortened(reason)}"]) from error
    if root is None:
        return Node({}, "line 1"), [Problem("line 1", "the recipe is empty")]
    return root, problems


def _unwritable(text: str) -> str | None:
    """Return why a text cannot be stored as UTF-8 or used in a path: a control character, or half of a surrogate pair."""
    for character in text:
        if character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cs"):
            return f"character U+{ord(character):04X} is not allowed"
    return None


def _tree_of(text: str, *, where: str) -> tuple[Node | None, list[Problem]]:
    """Return the tree of a YAML text (None if it is empty), and the problems of its form."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return None if root is None else loader.node_of(root, where=where), loader.problems
    finally:
        loader.dispose()


def apply_override(root: Node, override: str) -> Iterator[Problem]:
    """Set one value of the tree from `section.key=value`; an integer in the path selects a list item."""
    where = f"override {shortened(override)}"
    if problem := _unwritable(override):
        yield Problem(where, problem)
        return
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        yield Problem(where, "an override has the form section.key=value")
        return
    parent, keys = root, path.split(".")
    for depth, key in enumerate(keys[:-1]):
        child, problem = _step(parent, key, path=".".join(keys[: depth + 1]))
        if problem:
            yield Problem(where, problem)
            return
        if child is None or child.value is None:
            child = Node({}, where)
            _put(parent, key, child)
        parent = child
    _, problem = _step(parent, keys[-1], path=path)
    if problem:
        yield Problem(where, problem)
        return
    _put(parent, keys[-1], _value_of(text, where=where))


def _step(parent: Node, key: str, *, path: str) -> tuple[Node | None, str | None]:
    """Return the child `key` (None if it does not exist yet), or the reason why there cannot be one."""
    above = path.rpartition(".")[0]
    if isinstance(parent.value, dict):
        return parent.value.get(key), None
    if isinstance(parent.value, list):
        count = len(parent.value)
        if key in map(str, range(count)):
            return parent.value[int(key)], None
        return None, f"{above} has items 0..{count - 1}, got {key!r}" if count else f"{above} is an empty list"
    return None, f"{above} is a single value, it has no {key!r}"


def _put(parent: Node, key: str, child: Node) -> None:
    parent.value[int(key) if isinstance(parent.value, list) else key] = child


def _value_of(text: str, *, where: str) -> Node:
    """Return the value of an override: parsed as YAML if it is valid YAML, else the text itself."""
    try:
        node, problems = _tree_of(text, where=where)
    except yaml.YAMLError:
        return Node(text, where, text=text)
    if problems:
        return Node(text, where, text=text)
    if node is None:
        return Node("", where, text="")
    _relocate(node, where)
    return node


def _relocate(node: Node, where: str) -> None:
    node.where = where
    children = node.value.values() if isinstance(node.value, dict) else node.value
    if isinstance(node.value, dict | list):
        for child in children:
            _relocate(child, where)


class _TooDeepError(yaml.YAMLError):
    """Values are nested too deep for the recursive reader."""

    def __init__(self, start_mark: Any) -> None:
        super().__init__(f"nested deeper than {MAX_DEPTH} levels")
        self.start_mark = start_mark


class _Loader(yaml.SafeLoader):
    """A loader that returns the tree with lines, and refuses what would make a recipe hard to read, such as anchors."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[Problem] = []
        self._aliases: set[int] = set()
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            self._refuse(event, f"alias *{shortened(event.anchor)}: write the value itself, a recipe has no anchors")
            self.get_event()
            nothing = yaml.ScalarNode("tag:yaml.org,2002:null", "", event.start_mark, event.end_mark)
            self._aliases.add(id(nothing))
            return nothing
        if event.anchor is not None:
            self._refuse(event, f"anchor &{shortened(event.anchor)}: write the value itself, a recipe has no anchors")
        if self._depth == MAX_DEPTH:
            raise _TooDeepError(event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def node_of(self, raw: Any, *, where: str) -> Node:
        """Return the tree under a raw YAML node."""
        if raw.tag.rpartition(":")[2] not in PLAIN_TAGS:
            self._refuse(raw, f"tag {shortened(raw.tag)}: only plain values are allowed")
            return Node(None, where, refused=True)
        if isinstance(raw, yaml.MappingNode):
            return Node(self._mapping_of(raw), where)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node_of(item, where=_line(item)) for item in raw.value], where)
        if id(raw) in self._aliases:
            return Node(None, where, refused=True)
        return self._scalar_of(raw, where=where)

    def _scalar_of(self, raw: yaml.ScalarNode, *, where: str) -> Node:
        kind = raw.tag.rpartition(":")[2]
        try:
            value = raw.value if kind == "timestamp" else self.construct_object(raw)
        except (ValueError, LookupError, yaml.YAMLError):
            digits = f" of {len(raw.value):,} characters" if kind in ("int", "float") and len(raw.value) > 80 else ""
            self._refuse(raw, f"{shortened(raw.value)!r} cannot be read as {kind}{digits}")
            return Node(None, where, text=raw.value, refused=True)
        if problem := _unwritable(raw.value):
            self._refuse(raw, problem)
            return Node(None, where, text=raw.value, refused=True)
        return Node(value, where, text=raw.value)

    def _mapping_of(self, raw: yaml.MappingNode) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key, value in raw.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key must be a plain name")
            elif key.tag == "tag:yaml.org,2002:merge":
                self._refuse(key, "merge key <<: write the keys themselves, a recipe has no anchors")
            elif problem := _unwritable(key.value):
                self._refuse(key, problem)
            elif key.value in children:
                self._refuse(key, f"{shortened(key.value)}: given twice, first in {children[key.value].where}")
            else:
                children[key.value] = self.node_of(value, where=_line(key))
        return children

    def _refuse(self, at: Any, text: str) -> None:
        self.problems.append(Problem(_line(at), text))


def _line(at: Any) -> str:
    return f"line {at.start_mark.line + 1}"
