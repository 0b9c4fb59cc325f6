"""Checks a tree of values against a settings dataclass: returns an instance, or reports every problem at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, Union

from drafttrain.config.fields import BOUNDS, Field, describe, fields_of, kind_of, within
from drafttrain.config.nodes import Node, Problem
from drafttrain.core.printable import shortened
from drafttrain.core.registry import Registry

LARGEST_INTEGER = 2**63 - 1
"""The largest that tensors, files and other libraries can hold."""
LONGEST_TEXT = 4096
"""In characters; no path is longer."""


class Checker:
    """Walks nodes along dataclasses and collects problems; a returned value is valid only if there are none."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._num_refused = 0

    @property
    def _num_faults(self) -> int:
        """Problems of this walk, and values that the YAML reader refused before."""
        return len(self.problems) + self._num_refused

    def _skip(self) -> None:
        """Skip a value whose problem is reported already; its parent cannot be built."""
        self._num_refused += 1

    def refuse(self, node: Node, path: str, sentence: str) -> None:
        """Add one problem."""
        self.problems.append(Problem(node.where, f"{path}: {sentence}" if path else sentence))

    def settings(self, settings: type, node: Node, *, path: str = "", kind: str | None = None, base: Any = None) -> Any:
        """Return an instance of a settings dataclass; missing keys come from `base`, then from the defaults."""
        if not isinstance(node.value, dict):
            expected = "a section: keys and values, indented below it"
            return self._wrong(node, path, expected)
        before = self._num_faults
        fields = fields_of(settings)
        given = {key: child for key, child in node.value.items() if not (key == "kind" and kind)}
        self._unknown_keys(given, fields, path=path, replaced=getattr(settings, "REPLACED", {}))
        values: dict[str, Any] = {}
        for name, field in fields.items():
            here = _join(path, name)
            known = getattr(base, name, field.default) if base is not None else field.default
            if name in given:
                values[name] = self.field(field, given[name], path=here)
            elif known is MISSING or field.is_missing_from(given):
                self.refuse(node, here, f"missing. {field.help}".strip())
            else:
                values[name] = self._default(field, known, node, path=here)
        if self._num_faults > before:
            return None
        made = settings(**values)
        if kind and kind_of(made) != kind:
            object.__setattr__(made, "kind", kind)
        self._across_fields(made, node, path=path)
        return made

    def field(self, field: Field, node: Node, *, path: str) -> Any:
        """Return the value of one field."""
        if node.refused:
            return self._skip()
        if node.value is None and field.nullable:
            return None
        if field.registry is not None:
            return self._components(field, node, path=path)
        base = field.default if is_dataclass(field.default) else None
        return self._value(field.hint, node, path=path, bounds=field.metadata, base=base)

    def _default(self, field: Field, value: Any, node: Node, *, path: str) -> Any:
        """Return a default converted like a value of the recipe: numbers to their type, components to settings."""
        if value is None or is_dataclass(value):
            return value
        if isinstance(value, list) and value and all(map(is_dataclass, value)):
            return value
        return self.field(field, _as_node(value, node.where), path=path)

    def _components(self, field: Field, node: Node, *, path: str) -> Any:
        assert field.registry is not None
        if not field.is_list and not (field.may_be_list and isinstance(node.value, list)):
            return self._component(field.registry, node, path=path, default=field.default)
        if not isinstance(node.value, list):
            return self._wrong(node, path, "a list of mappings, each with its kind")
        return [
            self._component(field.registry, item, path=f"{path}.{i}", default=MISSING)
            for i, item in enumerate(node.value)
        ]

    def _component(self, registry: Registry, node: Node, *, path: str, default: Any) -> Any:
        """Return the settings of the component that `kind` names, by default the default's kind."""
        if node.refused:
            return self._skip()
        if not isinstance(node.value, dict):
            name = node.value if node.value in registry.names() else registry.names()[0] if registry.names() else "..."
            return self._wrong(node, path, f"a mapping with its kind, such as {{kind: {name}}}")
        kind_node = node.value.get("kind")
        default_kind = default.get("kind") if isinstance(default, Mapping) else kind_of(default)
        if kind_node is None and default_kind is None:
            available = ", ".join(registry.names())
            return self.refuse(node, path, f"kind is missing: which {registry.kind}? Available: {available}")
        if kind_node is not None and kind_node.refused:
            return self._skip()
        kind = default_kind if kind_node is None else kind_node.value
        if kind not in registry.names():
            return self.refuse(kind_node or node, f"{path}.kind", registry.unknown(shortened(str(kind))))
        base = None
        if kind == default_kind:
            base = default if is_dataclass(default) else self._from_mapping(registry, default, node.where)
        return self.settings(registry.entry(kind).settings, node, path=path, kind=kind, base=base)

    def _from_mapping(self, registry: Registry, mapping: Any, where: str) -> Any:
        """Return the settings of a default that is written as a mapping."""
        return self._component(registry, _as_node(mapping, where), path="", default=MISSING)

    def _value(self, hint: Any, node: Node, *, path: str, bounds: Mapping[str, Any], base: Any = None) -> Any:
        """Return a value of a type; add a problem if it does not fit."""
        if node.refused:
            return self._skip()
        if is_dataclass(hint):
            assert isinstance(hint, type)
            return self.settings(hint, node, path=path, base=base)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return self._one_of(arguments, node, path=path, bounds=bounds)
        if origin is Literal:
            return self._choice(arguments, node, path=path)
        if origin in (list, tuple, Sequence):
            return self._list(origin, arguments[0], node, path=path, bounds=bounds)
        if origin in (dict, Mapping):
            return self._dict(arguments[1], node, path=path, bounds=bounds)
        if hint is Any:
            return node.plain()
        return self._scalar(hint, node, path=path, bounds=bounds)

    def _one_of(self, hints: Sequence[Any], node: Node, *, path: str, bounds: Mapping[str, Any]) -> Any:
        """Return the value as the first of the types whose form it has."""
        for hint in hints:
            if _has_form(hint, node):
                return self._value(hint, node, path=path, bounds=bounds)
        return self._wrong(node, path, " or ".join(map(describe, hints)))

    def _choice(self, choices: Sequence[Any], node: Node, *, path: str) -> Any:
        if node.value in choices and type(node.value) in {type(choice) for choice in choices}:
            return node.value
        if node.text in choices:
            return node.text
        available = ", ".join(map(str, choices))
        near = difflib.get_close_matches(str(node.text), list(map(str, choices)), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return self.refuse(node, path, f"must be one of {available}, got {_shown(node)}.{hint}".removesuffix("."))

    def _list(self, origin: Any, hint: Any, node: Node, *, path: str, bounds: Mapping[str, Any]) -> Any:
        if not isinstance(node.value, list):
            return self._wrong(node, path, f"a list [{describe(hint)}, ...]")
        values = [self._value(hint, item, path=f"{path}.{i}", bounds=bounds) for i, item in enumerate(node.value)]
        return tuple(values) if origin is tuple else values

    def _dict(self, hint: Any, node: Node, *, path: str, bounds: Mapping[str, Any]) -> Any:
        if not isinstance(node.value, dict):
            return self._wrong(node, path, f"names with values, each {describe(hint)}")
        return {key: self._value(hint, child, path=f"{path}.{key}", bounds=bounds) for key, child in node.value.items()}

    def _scalar(self, hint: Any, node: Node, *, path: str, bounds: Mapping[str, Any]) -> Any:
        value: Any = _number(node) if hint in (int, float) else node.value
        if hint is float and type(value) is int and abs(value) <= LARGEST_INTEGER:
            value = float(value)
        if hint is str and not isinstance(value, str) and node.where.startswith("override") and node.text is not None:
            value = node.text
        if hint in (int, float) and type(value) is int and abs(value) > LARGEST_INTEGER:
            return self.refuse(
                node, path, f"must be between -{LARGEST_INTEGER} and {LARGEST_INTEGER}, got {_shown(node)}"
            )
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            quote = hint is str and node.text is not None and value is not None
            return self._wrong(
                node, path, describe(hint), advice=f': write "{shortened(str(node.text))}"' if quote else ""
            )
        if isinstance(value, str) and "${" in value:
            return self.refuse(
                node, path, f"references such as {shortened(value)} are not resolved: write the value itself"
            )
        if isinstance(value, str) and (problem := _text_problem(value)):
            return self.refuse(node, path, f"{problem}, got {_shown(node)}")
        if hint in (int, float):
            self._in_range(value, node, path=path, bounds=bounds)
        return value

    def _in_range(self, value: float, node: Node, *, path: str, bounds: Mapping[str, Any]) -> None:
        if not math.isfinite(value):
            self.refuse(node, path, f"must be a finite number, got {_shown(node)}")
            return
        wanted = [f"{sign} {bounds[name]:g}" for name, sign in BOUNDS.items() if bounds.get(name) is not None]
        if not within(value, bounds):
            self.refuse(node, path, f"must be {' and '.join(wanted)}, got {_shown(node)}")

    def _across_fields(self, made: Any, node: Node, *, path: str) -> None:
        """Call the settings' own check; a problem that starts with a key is reported at that key's line."""
        check = getattr(made, "check", None)
        for sentence in check() if callable(check) else ():
            at, key = node, sentence.partition(":")[0]
            for part in key.split("."):
                child = at.value.get(part) if isinstance(at.value, dict) else None
                if child is None:
                    break
                at = child
            known = key.partition(".")[0] in {field.name for field in dataclasses.fields(made)}
            text = sentence if not path else f"{path}.{sentence}" if known else f"{path}: {sentence}"
            self.problems.append(Problem(at.where, text))

    def _unknown_keys(
        self, given: Mapping[str, Node], fields: Mapping[str, Field], *, path: str, replaced: Mapping[str, str]
    ) -> None:
        """Refuse unknown keys; for a key of an older version, name the key that replaced it."""
        for key, child in given.items():
            if key in replaced:
                self.refuse(child, _join(path, key), f"this key was replaced by {replaced[key]}")
            elif key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                word, listed = ("key", "Keys here") if path else ("section", "Sections")
                hint = f"Did you mean {near[0]!r}?" if near else f"{listed}: {', '.join(fields) or 'none'}"
                self.refuse(child, _join(path, shortened(key)), f"unknown {word}. {hint}")

    def _wrong(self, node: Node, path: str, expected: str, *, advice: str = "") -> None:
        self.refuse(node, path, f"must be {expected}, got {_shown(node)}{advice}")


def _text_problem(value: str) -> str | None:
    """Return why this text is not valid for any key; most are names, paths and patterns."""
    if len(value) > LONGEST_TEXT:
        return f"must be at most {LONGEST_TEXT:,} characters"
    if re.match(r"~[\w.-]+/", value) and os.path.expanduser(value) == value:
        return "must not start with the home folder of an unknown user"
    return None


def _has_form(hint: Any, node: Node) -> bool:
    """Return whether a value has the form of a type, whatever its range."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return node.value in typing.get_args(hint)
    if origin in (list, tuple, Sequence):
        return isinstance(node.value, list)
    if origin in (dict, Mapping) or is_dataclass(hint):
        return isinstance(node.value, dict)
    if hint is float:
        return isinstance(_number(node), float | int) and not isinstance(node.value, bool)
    return hint is Any or type(node.value) is hint


def _number(node: Node) -> Any:
    """Return a scalar as a number if it is one: YAML 1.1 reads 1e-4 as text."""
    if not isinstance(node.value, str) or node.text is None:
        return node.value
    try:
        return float(node.text) if "e" in node.text.lower() else node.value
    except ValueError:
        return node.value


def _shown(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if isinstance(node.value, str):
        return f"'{shortened(node.value)}'"
    return "null" if node.value is None else shortened(str(node.text))


def _as_node(value: Any, where: str) -> Node:
    """Return a plain value as a tree."""
    if isinstance(value, Mapping):
        return Node({key: _as_node(child, where) for key, child in value.items()}, where)
    if isinstance(value, list | tuple):
        return Node([_as_node(child, where) for child in value], where)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return Node(value, where, text=text)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
