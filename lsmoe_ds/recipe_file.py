"""Reads recipes, and other YAML files made of sections, and explains what is wrong with them: the key, its line, what was found
and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lsmoe_ds import shipped
from lsmoe_ds.codes import resolve_codes, tags_of
from lsmoe_ds.config import Recipe, Section
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import nearest

S = TypeVar("S", bound=Section)
Lines = dict[tuple[str, ...], int]
DEEPEST, MOST = 40, 20_000  # levels and values in a file


def load_recipe(path: str | Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or one that comes with lsmoe_ds by its name. ``changes`` are merged into it, ``overrides`` are
    ``a.b=value`` strings with YAML values.

    Raises UserError with the key, its line where it has one, what was found and what is allowed.
    """
    path = shipped.choose("recipe", path)
    value, lines = read_mapping(path, "recipe", Recipe)
    own = tags_of(value, path)
    merge(value, changes or {})
    for override in overrides:
        apply_override(value, override)
    take_from_start(value)
    if wrong := resolve_codes(value, {*own, *tags_of(value, path)}):
        key, sentence = wrong
        at = tuple(key.split("."))
        raise UserError(f"{path}{f', line {lines[at]}' if at in lines else ''}: '{key}': {sentence}")
    return validate(Recipe, value, path, lines)


def take_from_start(value: dict[str, Any]) -> None:
    """Fill in what a recipe with ``training.start_from`` leaves out and the folder knows: ``model`` as a whole, and the keys of
    ``data.vocabulary``. Whether what it does say fits the folder is checked when training starts.

    Raises UserError if something is left out and the folder holds no recipe.
    """
    training, data = value.get("training"), value.get("data")
    start = training.get("start_from") if isinstance(training, dict) else None
    if not isinstance(start, str) or not isinstance(data, dict):
        return
    vocabulary = data.get("vocabulary") or {}
    if "model" in value and (not isinstance(vocabulary, dict) or {"file", "size", "type"} <= vocabulary.keys()):
        return
    try:
        known, _ = read_mapping(Path(start) / "recipe.yaml", "recipe", Recipe)
    except UserError as error:
        raise UserError(f"'training.start_from' is {start}: {error}") from None
    value.setdefault("model", known.get("model"))
    stored = known.get("data", {}).get("vocabulary", {})
    data["vocabulary"] = {**stored, "file": str(Path(start) / "vocabulary.model"), **vocabulary}


def read_mapping(path: Path, kind: str, section: type[Section]) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML file and the lines of its keys; ``kind`` is what errors call it, ``section`` what it should hold."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {path}{shipped.hint(kind)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {path} cannot be read: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        _add_lines(node, (), lines)
        value = loader.construct_document(node) if node is not None else None
    except UserError as error:
        raise UserError(f"{kind} {path}: {error}") from None
    except Exception as error:  # PyYAML has errors of its own, but also lets pass those of int(), dates and dictionaries
        raise UserError(f"{kind} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{kind} {path} must be a mapping with the keys {', '.join(section.model_fields)}")
    return value, lines


def validate(section: type[S], value: dict[str, Any], path: Path, lines: Lines) -> S:
    """What :func:`read_mapping` found as its section."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise UserError(_explain(path, error, lines, section)) from None


def merge(value: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Changes the keys of ``value`` in place: mappings key by key, all else as a whole."""
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(value.get(key), dict):
            merge(value[key], change)
        else:
            value[key] = deepcopy(change)


def apply_override(value: dict[str, Any], override: str) -> None:
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


def _add_lines(node: yaml.Node | None, at: tuple[str, ...], found: Lines) -> None:
    """Line of each key, counted from 1; refuses a key written twice, and what aliases make too large."""
    if len(at) > DEEPEST or len(found) > MOST:
        raise UserError(f"it has values in more than {DEEPEST} levels" if len(at) > DEEPEST else f"it has more than {MOST} values")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > 100:
        raise UserError(f"the number on line {node.start_mark.line + 1} is too long")
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"the key on line {key.start_mark.line + 1} is not text")
            here = (*at, str(key.value))
            if here in found:
                raise UserError(f"'{'.'.join(here)}' is written twice, on lines {found[here]} and {key.start_mark.line + 1}")
            found[here] = key.start_mark.line + 1
            _add_lines(child, here, found)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            found[(*at, str(index))] = child.start_mark.line + 1
            _add_lines(child, (*at, str(index)), found)


def _explain(path: Path, error: ValidationError, lines: Lines, whole: type[Section]) -> str:
    errors = error.errors()
    # Of a union's members each has complained: an unknown key tells more than "should be a string".
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # pydantic names the tried member of a union ("Corpus", "list[...]"): only what stands in the file is shown.
    at = tuple(
        str(part) for part in first["loc"] if not str(part)[:1].isupper() and "[" not in str(part) and str(part) not in ("str", "dict")
    )
    line = next((f", line {lines[at[:n]]}" for n in range(len(at), 0, -1) if at[:n] in lines), "")
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        known = _fields(at[:-1], whole)
        return f"{path}{line}: unknown key '{key}'{nearest(at[-1], known)}; allowed here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path}{line}: '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    found = f", found {first['input']!r}" if isinstance(first["input"], (str, int, float, bool)) else ""
    message = message[:1].lower() + message[1:]
    return f"{path}{line}: '{key}': {message}{found}" if key else f"{path}: {message}"


def _fields(at: tuple[str, ...], whole: type[Section]) -> list[str]:
    """Keys that are allowed at a place in a recipe or study."""
    section: Any = whole
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
