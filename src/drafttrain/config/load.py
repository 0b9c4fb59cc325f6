"""Reads a recipe from a YAML file and overrides, or reports every problem at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drafttrain.config.bundled import find_recipe
from drafttrain.config.check import Checker
from drafttrain.config.fields import fields_of
from drafttrain.config.nodes import MAX_BYTES, Node, Problem, apply_override, read_yaml
from drafttrain.config.older import translate_to_current
from drafttrain.config.recipe import Recipe
from drafttrain.config.smoke import shrink
from drafttrain.core.console import say_once
from drafttrain.core.errors import RecipeError
from drafttrain.core.printable import shortened

T = TypeVar("T")


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, smoke: bool = False) -> Recipe:
    """Return the recipe of a file, a run folder or a bundled name.

    Args:
        path: A YAML file, a run folder with its recipe.yaml (also one that an older version wrote), or the name of a bundled
            recipe (`demo`).
        overrides: `section.key=value`, applied before any check; list items by number.
        smoke: Shrink the recipe to about 20 steps through every stage.

    Raises:
        RecipeError: With every problem, each with its line or override.
    """
    file = find_recipe(path)
    of_run = Path(path).is_dir()
    recipe = read_recipe(_text_of(file, source=str(path)), overrides, source=str(path), of_run=of_run)
    return shrink(recipe) if smoke else recipe


def _text_of(file: Path, *, source: str) -> str:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise RecipeError(source, [f"{size:,} bytes: a recipe has at most {MAX_BYTES:,}"])
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(source, [f"not UTF-8: {error}"]) from error
    except OSError as error:
        raise RecipeError(source, [f"cannot be read: {error.strerror}"]) from error


def read_recipe(text: str, overrides: Sequence[str] = (), *, source: str, of_run: bool = False) -> Recipe:
    """Return the recipe of a YAML text.

    Args:
        of_run: The text is from a run folder; if an older version wrote it, its keys are translated to current ones.
    """
    root, problems = read_yaml(text, source=source)
    if of_run and (notes := translate_to_current(root)):
        say_once(f"{source}: written by an older version; read {', '.join(notes)}")
    for override in overrides:
        problems += apply_override(root, override)
    if not isinstance(root.value, dict):
        raise RecipeError(source, ["line 1: a recipe consists of sections: name, target, drafter, ..."])
    problems += _import_plugins(root)
    return _checked(Recipe, root, problems, source=source)


def load_sections(
    sections: Sequence[str],
    overrides: Sequence[str],
    *,
    source: str = "arguments",
    further: Mapping[str, type] | None = None,
) -> list[Any]:
    """Return sections built from defaults and overrides (`eval.temperatures=[1]`), without a recipe.

    `plugins=[my_lab.hydra]` imports plugins first, as in a recipe.

    Args:
        further: Sections that a recipe does not have, by name; they are returned last.

    Raises:
        RecipeError: With every problem of the overrides.
    """
    root = Node({}, "")
    problems = [problem for override in overrides for problem in apply_override(root, override)]
    problems += _import_plugins(root)
    root.value.pop("plugins", None)
    of_recipe = fields_of(Recipe)
    wanted = {section: of_recipe[section].hint for section in sections} | dict(further or {})
    allowed = ", ".join([*(f"{section}.key=value" for section in wanted), "plugins=[module]"])
    for name, child in root.value.items():
        if name not in wanted:
            problems.append(Problem(child.where, f"{name}: only these can be given here: {allowed}"))
    empty = Node({}, "")
    return [
        _checked(settings, root.value.get(section, empty), problems, source=source, path=section)
        for section, settings in wanted.items()
    ]


def _checked(settings: type[T], root: Node, problems: list[Problem], *, source: str, path: str = "") -> T:
    checker = Checker()
    made: T = checker.settings(settings, root, path=path)
    problems += checker.problems
    if not problems:
        problems += _no_structured_config(made)
    if problems:
        in_order = dict.fromkeys(map(str, sorted(problems, key=lambda problem: problem.order)))
        raise RecipeError(source, list(in_order))
    return made


def _no_structured_config(made: object) -> list[Problem]:
    """Check with OmegaConf too: settings are structured configs, by the types of their fields (values are checked before)."""
    return [
        Problem("", fault) for settings in dict.fromkeys(_settings_types(made)) if (fault := _fault_of_fields(settings))
    ]


def _settings_types(made: object) -> Iterator[type]:
    """Yield the type of settings, and those of all settings in it."""
    if isinstance(made, list):
        for item in made:
            yield from _settings_types(item)
    elif is_dataclass(made):
        yield type(made)
        for one in fields(made):
            yield from _settings_types(getattr(made, one.name))


@cache
def _fault_of_fields(settings: type) -> str | None:
    # A default may be None where the type has no None: then null is allowed, as `Field.nullable` says.
    hints = get_type_hints(settings)
    without_defaults = [(one.name, hints[one.name], MISSING) for one in fields(settings)]
    try:
        OmegaConf.structured(make_dataclass(settings.__name__, without_defaults))
    except OmegaConfBaseException as error:
        return str(error).replace("\n", " ")
    return None


def _import_plugins(root: Node) -> list[Problem]:
    """Import the recipe's plugins, which register kinds of their own."""
    node = root.value.get("plugins")
    problems = []
    for item in node.value if node and isinstance(node.value, list) else []:
        try:
            importlib.import_module(str(item.value))
        except ImportError as error:
            name = shortened(str(item.value))
            text = f"plugins: cannot import {name!r} ({shortened(str(error))}). Install it, or put its folder on PYTHONPATH"
            problems.append(Problem(item.where, text))
        except (Exception, SystemExit) as error:  # a plugin runs any code when it is imported
            name = shortened(str(item.value))
            text = f"plugins: {name!r} failed to import: {type(error).__name__}: {shortened(str(error))}"
            problems.append(Problem(item.where, text))
    return problems
