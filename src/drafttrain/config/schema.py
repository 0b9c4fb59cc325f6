"""The JSON Schema of a recipe (draft 2020-12), for completion and checks in editors."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, Union

from drafttrain.config.dump import plain
from drafttrain.config.fields import Field, fields_of
from drafttrain.config.recipe import TRAINED, Recipe
from drafttrain.config.searched import searched_kinds
from drafttrain.core.registry import Registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
# YAML 1.1 reads 1e-4 as text; a recipe takes it as a number.
WRITTEN_NUMBER = {"type": "string", "pattern": r"^[-+]?[0-9]*\.?[0-9]+[eE][-+]?[0-9]+$"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe, with one definition for each settings dataclass."""
    definitions: dict[str, Any] = {}
    root = _settings(Recipe, definitions)
    searched = {
        "properties": {"drafter": {"properties": {"kind": {"enum": searched_kinds()}}}},
        "required": ["drafter"],
    }
    trained = {"anyOf": [*({"required": list(sections)} for sections in TRAINED), searched]}
    return {"$schema": DIALECT, "title": "drafttrain recipe", **root, **trained, "$defs": definitions}


def _settings(settings: type, definitions: dict[str, Any], *, kind: str | None = None) -> dict[str, Any]:
    """Return the schema of one dataclass; with `kind`, of a component of this kind."""
    fields = fields_of(settings)
    properties = {name: _field(field, definitions) for name, field in fields.items()}
    required = [name for name, field in fields.items() if field.default is MISSING]
    if kind is not None:
        properties = {"kind": {"const": kind}, **properties}
        required = ["kind", *required]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    about = (settings.__doc__ or "").partition("\n")[0]
    return {"description": about, **schema} if about and not about.startswith(f"{settings.__name__}(") else schema


def _field(field: Field, definitions: dict[str, Any]) -> dict[str, Any]:
    if field.registry is not None:
        value = _component(field.registry, definitions)
        listed = {"type": "array", "items": value}
        value = listed if field.is_list else {"anyOf": [value, listed]} if field.may_be_list else value
    else:
        value = _type(field.hint, field.metadata, definitions)
    if field.nullable:
        value = {"anyOf": [value, {"type": "null"}]}
    shown = {} if field.default is MISSING or is_dataclass(field.default) else {"default": plain(field.default)}
    return {"description": field.help, **value, **shown}


def _component(registry: Registry, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the choice among the kinds of a registry."""
    for kind in registry.names():
        name = _definition_name(registry, kind)
        if name not in definitions:
            definitions[name] = {}  # a component may hold components of its own registry
            definitions[name] = _settings(registry.entry(kind).settings, definitions, kind=kind)
    return {"oneOf": [{"$ref": f"#/$defs/{_definition_name(registry, kind)}"} for kind in registry.names()]}


def _definition_name(registry: Registry, kind: str) -> str:
    return f"{registry.kind.replace(' ', '_')}.{kind}"


def _type(hint: Any, bounds: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _settings(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(argument, bounds, definitions) for argument in arguments]}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _type(arguments[0], bounds, definitions)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _type(arguments[1], bounds, definitions)}
    limits = {word: bounds[name] for name, word in BOUNDS.items() if bounds.get(name) is not None}
    if hint is float:
        return {"anyOf": [{"type": "number", **limits}, WRITTEN_NUMBER]}
    if hint is int:
        return {"type": "integer", **limits}
    return {str: {"type": "string"}, bool: {"type": "boolean"}, types.NoneType: {"type": "null"}}.get(hint, {})
