"""Reads a recipe file, and explains what is wrong with it: the key, its line, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lsmoe_ds.config import Recipe, Section
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import nearest


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file; ``overrides`` are ``a.b=value`` strings with YAML values.

    Raises UserError with the key, its line where it has one, what was found and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    try:
        value, lines = yaml.safe_load(text), _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"recipe {path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _apply_override(value, override)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(_explain(path, error, lines)) from None


def _apply_override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'--set {override}' is not understood: write --set a.b=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        value = value.setdefault(parent, {})
        if not isinstance(value, dict):
            raise UserError(f"'--set {override}': '{parent}' holds no keys")
    try:
        value[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"'--set {override}': '{text}' is not a YAML value") from None


def _lines(node: yaml.Node | None, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line of each key, counted from 1; refuses a key written twice."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            here = (*at, str(key.value))
            if here in found:
                raise UserError(f"'{'.'.join(here)}' is written twice, on lines {found[here]} and {key.start_mark.line + 1}")
            found[here] = key.start_mark.line + 1
            found.update(_lines(child, here))
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            found[(*at, str(index))] = child.start_mark.line + 1
            found.update(_lines(child, (*at, str(index))))
    return found


def _explain(path: Path, error: ValidationError, lines: dict[tuple[str, ...], int]) -> str:
    errors = error.errors()
    # Of a union's members each has complained: an unknown key tells more than "should be a string".
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # pydantic names the tried member of a union ("Corpus", "list[...]"): only what stands in a recipe is shown.
    at = tuple(
        str(part) for part in first["loc"] if not str(part)[:1].isupper() and "[" not in str(part) and str(part) not in ("str", "dict")
    )
    line = next((f", line {lines[at[:n]]}" for n in range(len(at), 0, -1) if at[:n] in lines), "")
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        known = _fields(at[:-1])
        return f"{path}{line}: unknown key '{key}'{nearest(at[-1], known)}; allowed here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path}{line}: '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    found = f", found {first['input']!r}" if isinstance(first["input"], (str, int, float, bool)) else ""
    message = message[:1].lower() + message[1:]
    return f"{path}{line}: '{key}': {message}{found}" if key else f"{path}: {message}"


def _fields(at: tuple[str, ...]) -> list[str]:
    """Keys that are allowed at a place in the recipe."""
    section: Any = Recipe
    for part in at:
        if part.isdigit():
            continue
        field = section.model_fields.get(part) if section is not None else None
        section = _section_of(field.annotation) if field is not None else section
    return list(section.model_fields) if section is not None else []


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
