"""Components by name: one file, one decorator, no list to edit."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """One registered component and the dataclass that configures it."""

    name: str
    component: type
    settings: type


class Registry:
    """The components of one kind, found by importing every module of the package that holds them.

    Args:
        kind: The name of a member in messages ("loss", "drafter").
        package: The package whose modules register members when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry] = {}
        self._scanned = False

    def register(self, name: str, settings: type) -> Callable[[T], T]:
        """Return the decorator that adds a class under `name`. The attribute `kind` of its settings becomes that name."""

        def add(component: T) -> T:
            known = self._entries.get(name)
            if known is not None and known.component.__qualname__ != component.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known.component} and {component}")
            self._entries[name] = Entry(name, component, settings)
            settings.kind = name  # type: ignore[attr-defined]
            return component

        return add

    def names(self) -> list[str]:
        """Return the names of all members, sorted."""
        self._scan()
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """Return the member called `name`.

        Raises:
            KeyError: No member has this name; the message suggests the nearest and lists all.
        """
        self._scan()
        if name not in self._entries:
            raise KeyError(self.unknown(name))
        return self._entries[name]

    def build(self, settings: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the component that `settings` configures: `component(settings, *args, **kwargs)`."""
        return self.entry(settings.kind).component(settings, *args, **kwargs)

    def unknown(self, name: str) -> str:
        """Return the message for an unknown `name`: the nearest member, and all members."""
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self.names())}"

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)


def component_mapping(settings: Any) -> dict[str, Any]:
    """Return the settings of a component as in a recipe: its kind and its own keys, and so for components inside of it."""
    values = {name: getattr(settings, name) for name in asdict(settings)}
    inner = {name: component_mapping(value) for name, value in values.items() if hasattr(value, "kind")}
    return {"kind": settings.kind} | asdict(settings) | inner


def components_of(value: Any) -> Iterator[Any]:
    """Yield the settings of a component and of all components inside it."""
    if isinstance(value, list):
        for item in value:
            yield from components_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "kind"):
            yield value
        for part in fields(value):
            yield from components_of(getattr(value, part.name))
