"""Find recipes, read them, and change single values by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml

import medseg
from medseg.errors import ConfigError, near_names
from medseg.schema.base import validate, write_text
from medseg.schema.recipe import Recipe


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with medseg."""
    package = Path(medseg.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_paths() -> dict[str, Path]:
    """Return name -> file of the recipes that come with medseg."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        ConfigError: If there is none.
    """
    known = recipe_paths()
    if str(recipe) in known:
        return known[str(recipe)]
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise ConfigError(
        f"no recipe {str(recipe)!r}: expected one of {', '.join(known)} or the path of a YAML file."
        f"{near_names(str(recipe), list(known))}"
    )


def read_recipe(
    recipe: str | Path, changes: Sequence[str] | Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe, with single values changed.

    Args:
        recipe: Name or path.
        changes: "path.to.field=value" strings (values are YAML), or path -> value.

    Raises:
        ConfigError: With every problem, in the file's words.
    """
    path = find_recipe(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected names and values, got a {type(values).__name__}.")
    for name, value in _parsed(changes or {}).items():
        _check_path(name)
        _set(values, name.split("."), value)
    return validate(Recipe, values, str(path) if not changes else f"{path} with --set")


def format_recipe(recipe: Recipe) -> str:
    """Return the whole resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parsed(changes: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(changes, Mapping):
        return dict(changes)
    parsed = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {change!r}: expected path.to.field=value.")
        try:
            parsed[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"--set {change!r}: {text!r} is not a YAML value; expected a number, a word or a "
                "list such as [0, 1]."
            ) from None
    return parsed


def _check_path(name: str) -> None:
    fields = Recipe.model_fields
    for depth, part in enumerate(name.split(".")):
        if part not in fields:
            where = ".".join(name.split(".")[:depth]) or "a recipe"
            raise ConfigError(
                f"--set {name}: {where} has no field {part!r}; expected one of: "
                f"{', '.join(fields)}.{near_names(part, list(fields))}"
            )
        annotation = fields[part].annotation
        if get_origin(annotation) is dict:
            return  # options: their owner knows their names
        fields = getattr(annotation, "model_fields", {})


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values[part] = dict(values.get(part) or {})
        values = values[part]
    values[path[-1]] = value


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a recipe to a new file.

    Raises:
        ConfigError: If there is no such recipe, or the file is there already.
    """
    source = find_recipe(name)
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: expected a file name that ends in .yaml.")
    if target.exists():
        raise ConfigError(f"{target}: is there already. Choose another name.")
    write_text(target, source.read_text(encoding="utf-8"))
    return target
