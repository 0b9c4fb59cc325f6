"""The recipes that come with drafttrain, and how a recipe is found by its path or name."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import RecipeError
from drafttrain.core.files import write_text
from drafttrain.core.printable import shortened

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class BundledRecipe:
    """A bundled recipe."""

    name: str
    path: Path
    title: str
    """The first comment line: what it trains."""


def bundled_folder() -> Path:
    """Return the folder of the bundled recipes: in the installed package, or at the root of a checkout.

    In a checkout the first is a link to the second, so that a wheel contains the files. Without support for links, the root is used.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed.resolve() if installed.is_dir() else package.parents[1] / "recipes"


def bundled_recipes() -> list[BundledRecipe]:
    """Return all bundled recipes, sorted by name."""
    paths = sorted(bundled_folder().glob("*.yaml"))
    return [BundledRecipe(path.stem, path, title_of(path.read_text(encoding="utf-8"))) for path in paths]


def find_recipe(name: Path | str) -> Path:
    """Return the file of a recipe, given as a path, a run folder, or the name of a bundled recipe.

    Raises:
        RecipeError: There is no such file.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        if (path / "recipe.yaml").is_file():
            return path / "recipe.yaml"
        if path.is_dir():
            raise RecipeError(str(name), ["no recipe.yaml in this folder, so it is not a run of drafttrain"])
        if path.exists():
            raise RecipeError(str(name), ["not a regular file"])
    except OSError as error:
        raise RecipeError(shortened(str(name)), [f"cannot be read: {error.strerror}"]) from error
    bundled = {recipe.name: recipe.path for recipe in bundled_recipes()}
    if str(name) in bundled:
        return bundled[str(name)]
    near = difflib.get_close_matches(path.stem, bundled, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Bundled: {', '.join(bundled) or 'none'}"
    raise RecipeError(shortened(str(name)), [f"neither a file nor a bundled recipe. {hint}"])


def is_recipe(name: Path | str) -> bool:
    """Return whether `name` is a recipe (a file, a run folder, a bundled name) and not a drafter folder."""
    path = Path(name)
    if path.is_dir():
        return (path / "recipe.yaml").is_file()
    return path.suffix in SUFFIXES or str(name) in {recipe.name for recipe in bundled_recipes()}


def title_of(text: str) -> str:
    """Return the first comment line of a recipe, without mode lines of editors."""
    for line in text.splitlines():
        comment = line.strip().lstrip("#").strip()
        if line.startswith("#") and comment and not comment.startswith("yaml-language-server"):
            return comment
    return ""


def copy_recipe(name: str, to: Path | None = None) -> Path:
    """Copy a recipe to a file or into a folder (by default the current one), and return the new path.

    Raises:
        RecipeError: There is no such recipe, or the file exists already.
    """
    source = find_recipe(name)
    path = to or Path(source.name)
    path = path / source.name if path.is_dir() else path
    if path.exists():
        raise RecipeError(str(path), ["exists already: give another name"])
    write_text(path, source.read_text(encoding="utf-8"))
    return path
