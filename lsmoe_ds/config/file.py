"""Read recipes and other YAML files made of sections. Errors name the key, its line or option, what was found
and what is allowed (:mod:`lsmoe_ds.config.explain`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lsmoe_ds import shipped
from lsmoe_ds.config.codes import resolve_codes, tags_of
from lsmoe_ds.config.explain import At, Place, Places, explain, name
from lsmoe_ds.config.host import HOST
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.section import Section
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import how_to_import

S = TypeVar("S", bound=Section)
PlaceOf = Callable[[int], Place]  # from the number of a line


@dataclass(frozen=True)
class Wanted:
    """The requirements of a recipe on a model to import: its section ``data``, with the places of all keys.

    ``check`` raises UserError unless the recipe is valid with a given section ``model``.
    """

    data: Mapping[str, Any]
    places: Places
    check: Callable[[Mapping[str, Any]], None]


# Returns the folder of the imported form of a model, or None if the model is used as a host.
Importing = Callable[[Path, Wanted], Path | None]
DROPOUT = ("dropout", "attention_dropout")
GIVEN = ("preset", "hidden", "heads", "encoder", "decoder")  # keys of `model` that an imported one fixes
DEEPEST, MOST = 40, 20_000  # limits of a file: levels of nesting, and values
MISREAD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that YAML 1.1 reads in base 8 (``010``) or base 60 (``1:30``)."""


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    changed_by: str = "this command",
    importing: Importing | None = None,
) -> Recipe:
    """Read a recipe from a file, or by the name of one that comes with lsmoe_ds.

    ``changes`` are merged into it, ``overrides`` are ``a.b=value`` strings with YAML values. ``importing``
    converts a ``model.huggingface`` that is no host to a folder from which training can start
    (:mod:`lsmoe_ds.convert.imported`).

    Raises UserError with the key, its line or option, what was found and what is allowed.
    """
    path = shipped.choose("recipe", path)
    value, places = read_mapping(path, "recipe", Recipe)
    _find_vocabulary(value, path)
    _find_host(value, path)
    own = tags_of(value, path)
    _mark(changes or {}, f"{path}, changed by {changed_by}", (), places)
    merge(value, changes or {})
    for override in overrides:
        apply_override(value, override, places)
    if importing is not None:
        _import_host(value, path, places, importing)
    take_from_start(value, path, places)
    if wrong := resolve_codes(value, {*own, *tags_of(value, path)}):
        key, sentence = wrong
        at = tuple(key.split("."))
        raise UserError(f"{places[at].where if at in places else path}: {name(at)}: {sentence}")
    return validate(Recipe, value, path, places)


def _find_vocabulary(value: dict[str, Any], path: Path) -> None:
    """If the vocabulary's file is gone, set it to the copy in the recipe's own run or converted folder."""
    data, beside = value.get("data"), path.with_name("vocabulary.model")
    vocabulary = data.get("vocabulary") if isinstance(data, dict) else None
    if path.name != "recipe.yaml" or not isinstance(vocabulary, dict) or not beside.is_file():
        return
    file = vocabulary.get("file")
    if isinstance(file, str) and not Path(file).is_file():
        vocabulary["file"] = str(beside)


def _find_host(value: dict[str, Any], path: Path) -> None:
    """If the folder of ``model.huggingface`` is gone, set it to the copy of its configuration in the recipe's
    own run or converted folder.
    """
    model, beside = value.get("model"), path.with_name(HOST)
    folder = model.get("huggingface") if isinstance(model, dict) else None
    is_copy = path.name == "recipe.yaml" and beside.is_dir()
    if is_copy and isinstance(model, dict) and isinstance(folder, str) and not Path(folder).is_dir():
        model["huggingface"] = str(beside)


def _import_host(value: dict[str, Any], path: Path, places: Places, importing: Importing) -> None:
    """Let training start from the imported form of ``model.huggingface``, if it must be imported."""
    model, training, data = (value.get(key) for key in ("model", "training", "data"))
    if not isinstance(model, dict) or not isinstance(training, dict) or not isinstance(data, dict):
        return  # the recipe's own checks say what is wrong with it
    folder, at = model.get("huggingface"), ("model", "huggingface")
    if not isinstance(folder, str) or model.get("task", "translate") != "translate":
        return
    said = f"{places[at].where if at in places else path}: 'model.huggingface' is {folder}"
    methods = {key: each for key, each in model.items() if key not in (*GIVEN, "huggingface")}

    def check_given() -> None:
        given = [f"model.{key}" for key in GIVEN if key in model]
        given += [f"data.{key}" for key in ("tags", "vocabulary") if key in data]
        if given:
            raise UserError(f"{said}, which decides '{given[0]}': leave that out")
        if training.get("start_from") is not None:
            raise UserError(f"{said}, with which training starts: leave 'training.start_from' out")

    def check(sizes: Mapping[str, Any]) -> None:
        check_given()
        tried = deepcopy(value) | {"model": {**sizes, **methods}}
        tried["training"]["start_from"] = folder
        if resolve_codes(tried) is None:  # otherwise the model's vocabulary may know the codes
            validate(Recipe, tried, path, places)

    try:
        found = importing(Path(folder), Wanted(data, places, check))
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{said}: {error}") from None
    if found is None:
        return
    check_given()
    own, _ = read_mapping(found / "recipe.yaml", "recipe", Recipe)
    value["model"] = methods
    dropout = {key: each for key, each in own.get("training", {}).items() if key in DROPOUT}
    value["training"] = {**dropout, **training, "start_from": str(found)}


def take_from_start(value: dict[str, Any], path: Path, places: Places) -> None:
    """Fill in keys that a recipe with ``training.start_from`` leaves out from the recipe in that folder.

    These are the keys of ``model``, unless it has ``preset`` or ``hidden``; those of ``data.vocabulary``; and
    ``data.tags``. A recipe with its own model and vocabulary does not need the folder. Training checks later
    whether the recipe's own keys fit the folder.

    Raises UserError if something is left out and the folder holds no recipe.
    """
    training, data = value.get("training"), value.get("data")
    start = training.get("start_from") if isinstance(training, dict) else None
    if not isinstance(start, str) or start == "None" or not isinstance(data, dict):
        return  # the recipe's own checks say what is wrong with it
    vocabulary = data.get("vocabulary") or {}
    model = value.get("model", {})
    if isinstance(model, dict) and "huggingface" in model:
        return  # its configuration and tokenizer determine all of these
    whole = not isinstance(model, dict) or bool({"preset", "hidden"} & model.keys())
    if whole and (not isinstance(vocabulary, dict) or {"file", "size", "type"} <= vocabulary.keys()):
        return
    stored_recipe, at = Path(start) / "recipe.yaml", ("training", "start_from")
    said = f"{places[at].where if at in places else path}: 'training.start_from' is {start}"
    if not stored_recipe.is_file():
        how = how_to_import(Path(start)) or "give a folder that `lsmoe convert` made"
        raise UserError(f"{said}: there is no {stored_recipe}: {how}")
    try:
        known, known_places = read_mapping(stored_recipe, "recipe", Recipe)
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    if not whole:
        value["model"] = {**known.get("model", {}), **model}
        places.update(
            {at: place for at, place in known_places.items() if at[:1] == ("model",) and at not in places}
        )
    known_data = known.get("data", {})
    if "tags" in known_data:
        data.setdefault("tags", known_data["tags"])
    stored = known_data.get("vocabulary", {})
    data["vocabulary"] = {**stored, "file": str(Path(start) / "vocabulary.model"), **vocabulary}


def read_mapping(path: Path, kind: str, section: type[Section]) -> tuple[dict[str, Any], Places]:
    """Read the mapping in a YAML file and the places of its keys. Errors call the file a ``kind`` that should
    hold a ``section``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {path}{shipped.hint(kind)}") from None
    except IsADirectoryError:
        inside = path / "recipe.yaml"
        hint = f": give {inside}" if inside.is_file() else ""
        raise UserError(f"{kind} {path} is a folder{hint}") from None
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{kind} {path} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start + 1})"
        ) from None
    try:
        value, places = _read_yaml(text, (), lambda line: Place(f"{path}, line {line}", file=path))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # PyYAML raises its own errors, and does not catch those of int(), dates and dictionaries
        tab = next(
            (n for n, line in enumerate(text.split("\n"), start=1) if re.match(r" *\t[\t ]*\S", line)), None
        )
        why = f"line {tab} is indented with a tab: use spaces" if tab else _unquoted(text, error)
        why = why or " ".join(str(error).split())
        raise UserError(f"{kind} {path} is not valid YAML: {why}") from None
    if not isinstance(value, dict):
        raise UserError(f"{kind} {path} must be a mapping with the keys {', '.join(section.model_fields)}")
    return value, places


def validate(section: type[S], value: dict[str, Any], path: Path, places: Places) -> S:
    """Turn the result of :func:`read_mapping` into its section. Raises UserError if it is invalid."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise UserError(explain(error, section, value, path, places)) from None


def merge(value: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge ``changes`` into ``value`` in place: mappings key by key; other values are replaced."""
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(value.get(key), dict):
            merge(value[key], change)
        else:
            value[key] = deepcopy(change)


def apply_override(value: dict[str, Any], override: str, places: Places) -> None:
    """Change one key of ``value`` in place as a ``--set`` option says, and record that in ``places``."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'--set {override}' is not understood: write --set a.b=value")
    at = tuple(key.strip().split("."))
    place = Place(f"'--set {override}'", by_option=True)
    for level, parent in enumerate(at[:-1], 1):
        if parent not in value:
            places[at[:level]] = place
        value = value.setdefault(parent, {})
        if not isinstance(value, dict):
            raise UserError(f"'--set {override}': '{parent}' holds no keys")
    try:
        value[at[-1]], found = _read_yaml(text, at, lambda line: place)
    except UserError:
        raise
    except Exception as error:  # as in read_mapping
        why = _unquoted(text, error)
        raise UserError(f"{place.where}: '{text}' is not a YAML value{f': {why}' if why else ''}") from None
    for replaced in [key for key in places if key[: len(at)] == at]:
        del places[replaced]
    places.update({at: place, **found})


def _unquoted(text: str, error: Exception) -> str | None:
    """Name the unquoted pattern, if YAML has failed on its ``*`` or ``[``."""
    of_alias = getattr(error, "context", None) == "while scanning an alias"
    mark = getattr(error, "context_mark" if of_alias else "problem_mark", None)
    if mark is None:
        return None
    before = re.split(r"""[\s,\[\]{}'"]""", text[: mark.index])[-1]
    after = re.match(r"(\[[^\]\s]*\]|[^\s,\[\]{}])*", text[mark.index :])
    word, line = before + (after[0] if after else ""), text.count("\n", 0, mark.index) + 1
    where = f"line {line}: " if "\n" in text else ""
    if word.startswith("*"):
        return f"{where}{word} begins with *, by which YAML means an alias: write '{word}' in quotes"
    if before and word.startswith(f"{before}["):
        return f"{where}{word} has brackets, by which YAML means a list: write '{word}' in quotes"
    return None


def _read_yaml(text: str, at: At, place: PlaceOf) -> tuple[Any, Places]:
    """Read the value of a YAML text, which belongs at ``at`` in the recipe, and the place of every key."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    places: Places = {}
    if node is None:
        return None, places
    _add_places(node, at, places, place)
    return _unshare(loader.construct_document(node)), places


def _unshare(value: Any) -> Any:
    """Copy the values of aliases, so that a change in one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshare(child) for key, child in value.items()}
    return [_unshare(child) for child in value] if isinstance(value, list) else value


def _add_places(node: yaml.Node, at: At, found: Places, place: PlaceOf) -> None:
    """Record the place of each key. Refuse duplicate keys, keys that are not text, numbers in base 8 or 60,
    and a file that is too large.
    """
    line = node.start_mark.line + 1
    if len(at) > DEEPEST or len(found) > MOST:
        many = (
            f"it has values in more than {DEEPEST} levels"
            if len(at) > DEEPEST
            else f"it has more than {MOST} values"
        )
        raise UserError(f"{place(line).where}: {many}")
    if isinstance(node, yaml.ScalarNode):
        _check_number(node, at, place(line).where)
        found[at] = replace(place(line), written=node.value)
    elif isinstance(node, yaml.MappingNode):
        found.setdefault(at, place(line))
        keys: dict[str, int] = {}
        _check_thousands(node, at, place(line).where)
        for key, child in node.value:
            line = key.start_mark.line + 1
            _check_key(key, (*at, str(key.value)), keys, place(line).where)
            keys[key.value] = line
            found[*at, key.value] = place(line)
            _add_places(child, (*at, key.value), found, place)
    elif isinstance(node, yaml.SequenceNode):
        found.setdefault(at, place(line))
        for index, child in enumerate(node.value):
            _add_places(child, (*at, str(index)), found, place)


def _check_key(key: yaml.Node, at: At, known: Mapping[str, int], where: str) -> None:
    """Refuse a key that is not text, or that is in ``known``, the lines of earlier keys."""
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{where}: a key is not text")
    if not key.tag.endswith((":str", ":merge", ":value")):
        raise UserError(
            f"{where}: the key {key.value or '(nothing)'} is not text to YAML: write '{key.value}' in quotes"
        )
    if key.value in known:
        raise UserError(
            f"{where}: {name(at)} is written twice, on lines {known[key.value]} and {key.start_mark.line + 1}"
        )


def _check_thousands(node: yaml.MappingNode, at: At, where: str) -> None:
    """Refuse ``{steps: 1,000}``, in which the comma begins another key, 000."""
    for (key, value), following in pairwise(node.value):
        if node.flow_style and _is_number(value) and _is_number(following[0]) and following[1].value == "":
            written = f"{value.value},{following[0].value}"
            number = f"{name((*at, key.value))} is {written}"
            raise UserError(f"{where}: {number}, but a comma ends a number in braces: write digits only")


def _is_number(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.isdecimal()


def _check_number(node: yaml.ScalarNode, at: At, where: str) -> None:
    """Refuse a number that YAML 1.1 does not read as a person does."""
    if node.style is not None or not node.tag.endswith((":int", ":float")):
        return
    key, written = name(at) if at else "a number", node.value
    if len(written) > 100:
        raise UserError(f"{where}: {key} is a number of {len(written)} digits, which is too long")
    if found := MISREAD.fullmatch(written):
        base, read = (
            (8, int(written, 8))
            if found[1].startswith("0") and ":" not in written
            else (60, yaml.safe_load(written))
        )
        if base == 60 or read != int(written):
            choices = f"{read}, or" if base == 60 else f"{read} or {int(written)}, or for text"
            raise UserError(
                f"{where}: {key} is {written}, which YAML reads in base {base}: write {choices} '{written}' "
                "in quotes"
            )


def _mark(changes: Any, where: str, at: At, places: Places) -> None:
    """Record in ``places`` where changes come from."""
    for key, change in changes.items() if isinstance(changes, Mapping) else ():
        places[*at, str(key)] = Place(where)
        _mark(change, where, (*at, str(key)), places)
