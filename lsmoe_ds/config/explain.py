"""Turn pydantic's error about a wrong value into one sentence: the file's key, its place, what was found,
what is allowed.
"""

from __future__ import annotations

import datetime
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from lsmoe_ds.config.method import MISFIT, VARIABLE
from lsmoe_ds.config.section import KIND, NAME, Section, is_section
from lsmoe_ds.folders import how_to_rename
from lsmoe_ds.languages import nearest

At = tuple[str, ...]
LONGEST = 60  # characters of a value that is shown
LISTED = 350  # characters of a list of keys, of which the rest is left out


@dataclass(frozen=True)
class Place:
    """Where a value is written.

    ``where`` is ``r.yaml, line 5`` or ``'--set a.b=c'``; ``written`` is a scalar's text; ``file`` is None for
    a value that is not from a file.
    """

    where: str
    written: str = ""
    by_option: bool = False
    file: Path | None = None


Places = dict[At, Place]

MOST_OPTIONS = 3  # that an error repeats
MOST_PLACES = 3  # that an error suggests for a key

# The types of errors about a value's own type, not about its content: each member of a union reports one.
KINDS = {KIND, "none_required", "int_from_float", "finite_number", "int_parsing_size", "is_instance_of"} | {
    f"{kind}_{what}"
    for kind in (
        "string",
        "int",
        "float",
        "bool",
        "list",
        "tuple",
        "dict",
        "model",
        "path",
        "model_attributes",
    )
    for what in ("type", "parsing")
}
LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
MAPPINGS = (dict, Mapping)
SINGULAR = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
PLURAL = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false", Path: "paths"}


def explain(
    error: ValidationError, section: type[Section], value: Mapping[str, Any], path: Path, places: Places
) -> str:
    """Return one sentence on the first error of validating ``value``, read from ``path``, as ``section``."""
    if renamed := _explain_renamed(error.errors(), section, value, path, places):
        return renamed
    first, at = _choose(error.errors(), value)
    found = first["input"]
    for key in first.get("ctx", {}).get("inner", ()):  # a list or mapping is refused because of this item
        at, found = (*at, str(key)), found[key]
    where = _where(at, path, places)
    if first["type"] == "extra_forbidden":
        known = allowed_keys(at[:-1], section)
        guess = nearest(at[-1], known) or _elsewhere(at[-1], section)
        more = f"; methods of your own are found by {VARIABLE}" if at[:-1] == ("model",) and not guess else ""
        allowed = _shorten(known) if guess else ", ".join(known)
        return f"{where}: unknown key {name(at)}{guess}; allowed here: {allowed}{more}"
    annotation = _annotation(at, section)
    if first["type"] == "missing":
        options = _options(at[:-1], places, where)
        return f"{where}{options}: {name(at)} is missing: it should be {expected(annotation)}"
    if first["type"] == MISFIT:
        said = first["ctx"]["said"]
        return f"{where}{_options(at[:-1], places, where, said)}: {name(at)}: {said}"
    if first["type"] == "value_error":
        said = str(first["ctx"]["error"])
        return f"{where}{_options(at, places, where, said)}: {name(at) + ': ' if at else ''}{said}"
    if found is None and (wanted := is_section(annotation)):
        parent = is_section(_annotation(at[:-1], section))
        left_out = (
            "" if parent is not None and parent.model_fields[at[-1]].is_required() else ", or leave it out"
        )
        return (
            f"{where}: {name(at)} is empty: write its keys below it "
            f"({_shorten(wanted.model_fields)}){left_out}"
        )
    return (
        f"{where}: {name(at) if at else 'it'} "
        f"{_sentence(first, annotation, found, places.get(at, Place('')))}"
    )


def _explain_renamed(
    errors: Sequence[Any], section: type[Section], value: Mapping[str, Any], path: Path, places: Places
) -> str:
    """List all keys of earlier versions with their new names; return an empty text if there are none.

    For a file that lsmoe_ds wrote, add how to rename them.
    """
    told: list[str] = []
    files: dict[Path, None] = {}
    for error in errors:
        at, _ = _path(error, value)
        if error["type"] != "extra_forbidden" or (new := _renamed(at, section)) is None:
            continue
        where, file = _where(at, path, places), places.get(at, Place("")).file
        if file is not None:
            where = where.removeprefix(f"{file}, ") if file in files else where
            files[file] = None
        told.append(f"{where}: {name(at)} is now called {name((*at[:-1], new))}")
    return "; ".join([*told, *(how for file in files if (how := how_to_rename(file)))])


def _sentence(error: Mapping[str, Any], annotation: Any, found: Any, place: Place) -> str:
    """Return the end of the sentence: what a value should be, and what was found."""
    kind, context = error["type"], error.get("ctx", {})
    shown = f", found {_show(found, place)}"
    if kind == "none_text":
        return "is the text 'None': YAML's word for nothing is null, or leave the key out"
    if kind in LIMITS:
        return f"should be {LIMITS[kind].format(**context)}{shown}"
    if kind == "finite_number":
        return f"should be a finite number{shown}"
    if kind == "literal_error":
        choices = _choices(annotation) or re.findall(r"'([^']*)'", str(context.get("expected")))
        guess = nearest(found, choices) if isinstance(found, str) else ""
        hint = _hint(str, found, place) if place.written in choices else _hint(annotation, found, place)
        if not _choices(annotation):  # a key of a mapping: the annotation is that of its value
            return f"should be {_one_of(choices)}{shown}{guess}"
        return f"should be {expected(annotation)}{shown}{guess or hint}"
    if kind in ("too_short", "string_too_short"):
        what = "character" if kind.startswith("string") else "entry"
        return f"should have at least {context['min_length']} {what}{shown}"
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME:
        return f"should consist of letters, digits, '.', '_' and '-' and begin with a letter or digit{shown}"
    if kind in KINDS:
        return f"should be {expected(annotation)}{shown}{_hint(annotation, found, place)}"
    message = str(error["msg"])
    return f"is not valid: {message[:1].lower()}{message[1:]}{shown}"


def _choose(errors: Sequence[Any], value: Any) -> tuple[Any, At]:
    """Return the most helpful error, with its path: an unknown key first; in a union, an error of the member
    that fits best.
    """
    placed = [(error, *_path(error, value)) for error in errors]
    for error, at, _ in placed:
        if error["type"] == "extra_forbidden":
            return error, at
    first, at, root = placed[0]
    if root is None:
        return first, at
    members = [(error, path) for error, path, _ in placed if path[: len(root)] == root]
    deeper = [(error, path) for error, path in members if len(path) > len(root)]
    telling = [(error, path) for error, path in members if error["type"] not in KINDS]
    return next(iter(deeper + telling), (first, root))


def _path(error: Mapping[str, Any], value: Any) -> tuple[At, At | None]:
    """Return the keys that lead to an error in the file, and those that lead to the first union on the path,
    or None.

    pydantic's location also contains the member of each union that it tried (``Corpus``, ``list[...]``),
    which is not in the file.
    """
    path: list[str] = []
    union: At | None = None
    for number, part in enumerate(error["loc"], start=1):
        is_item = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
        elif error["type"] != "missing" or number < len(error["loc"]):
            union = tuple(path) if union is None else union
            continue
        path.append(str(part))
    return tuple(path), union


def _where(at: At, path: Path, places: Places) -> str:
    found = next((places[at[:n]] for n in range(len(at), 0, -1) if at[:n] in places), None)
    return found.where if found else str(path)


def _options(at: At, places: Places, where: str, message: str = "") -> str:
    """Return `` with OPTIONS`` if options set something below ``at``, and the error about all of ``at`` names
    another place.

    If the message names keys of some options, only those with the most of them are cited.
    """
    words = set(re.findall(r"\w+", message))
    below = {
        place.where: len(words & set(key[len(at) :]))
        for key, place in places.items()
        if place.by_option and key[: len(at)] == at and place.where != where
    }
    most = max(below.values(), default=0)
    options = [option for option, named in below.items() if named == most][:MOST_OPTIONS]
    return f" with {' '.join(options)}" if options else ""


def name(at: At) -> str:
    """Write a path as a person would: ``'training.steps'``, ``item 2 of 'data.languages'``, ``'format' in
    item 1 of 'data.corpora'``.
    """
    last = next((index for index in range(len(at) - 1, -1, -1) if at[index].isdigit() and index), None)
    if last is None:
        return f"'{'.'.join(at)}'"
    item = f"item {int(at[last]) + 1} of {name(at[:last])}"
    rest = at[last + 1 :]
    return f"'{'.'.join(rest)}' in {item}" if rest else item


# --- the values that the fields of sections allow


def allowed_keys(at: At, section: type[Section]) -> list[str]:
    """Return the keys that are allowed at a place."""
    found = is_section(_annotation(at, section))
    return list(found.model_fields) if found else []


def _elsewhere(key: str, section: type[Section]) -> str:
    """Return `` (did you mean 'training.steps'?)`` for the key ``steps`` of another section, or nothing.

    Of several places, those nearest to the recipe's top level are named, unless there are too many to help.
    """
    level: list[tuple[At, type[Section]]] = [((), section)]
    while level:
        if places := [name((*at, key)) for at, each in level if key in each.model_fields]:
            return f" (did you mean {_one_of(places)}?)" if len(places) <= MOST_PLACES else ""
        level = [
            ((*at, inner), found)
            for at, each in level
            for inner, field in each.model_fields.items()
            if (found := is_section(field.annotation)) is not None
        ]
    return ""


def _renamed(at: At, section: type[Section]) -> str | None:
    """Return the new name of a key of earlier versions; None for any other key."""
    found = is_section(_annotation(at[:-1], section))
    return found.renamed.get(at[-1]) if found else None


def _annotation(at: At, annotation: Any) -> Any:
    """Return the annotation of the value at a path."""
    for part in at:
        section = is_section(annotation)
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            annotation = next((inner for inner in _items(annotation)), Any)
    return annotation


def _members(annotation: Any) -> Iterable[Any]:
    """Yield the members of a union, without None, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is not type(None):
        yield annotation


def _items(annotation: Any) -> Iterable[Any]:
    """Yield the annotations of the items of lists and mappings in an annotation."""
    for member in _members(annotation):
        if get_origin(member) in (list, tuple, *MAPPINGS):
            yield get_args(member)[1 if get_origin(member) in MAPPINGS else 0]


def _choices(annotation: Any) -> list[str]:
    return [
        str(choice)
        for member in _members(annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def _shorten(keys: Iterable[str]) -> str:
    """List keys, or the first of them if there are many."""
    text = ", ".join(keys)
    return text if len(text) <= LISTED else f"{text[:LISTED].rpartition(', ')[0]}, ..."


def _one_of(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]


def expected(annotation: Any, plural: bool = False) -> str:
    """Describe the values that an annotation allows: ``a whole number or a list of whole numbers``."""
    words = []
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            words.append(_one_of(_choices(member)))
        elif origin in (list, tuple):
            words.append(f"{'lists' if plural else 'a list'} of {expected(get_args(member)[0], plural=True)}")
        elif origin in MAPPINGS:
            items = (
                ""
                if get_args(member)[1] is Any
                else f" from names to {expected(get_args(member)[1], plural=True)}"
            )
            words.append(f"{'mappings' if plural else 'a mapping'}{items}")
        elif section := is_section(member):
            words.append(
                f"{'mappings' if plural else 'a mapping'} with the keys {_shorten(section.model_fields)}"
            )
        else:
            words.append((PLURAL if plural else SINGULAR).get(member, "a value"))
    return " or ".join(words)


def _show(found: Any, place: Place) -> str:
    """Show a value as the file spells it, if that is known."""
    if found is None:
        return f"{place.written}" if place.written else "nothing"
    if isinstance(found, Mapping):
        return "a mapping"
    if isinstance(found, list | tuple):
        text = str(list(found))
        return text if len(text) <= LONGEST else "a list"
    text = place.written if place.written and not isinstance(found, str) else repr(found)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _hint(annotation: Any, found: Any, place: Place) -> str:
    """Return a hint for a value that YAML reads as another type than was meant."""
    members = list(_members(annotation))
    written = place.written or str(found)
    if str in members or Path in members:
        read = (
            "a date"
            if isinstance(found, datetime.date)
            else "a number"
            if isinstance(found, int | float)
            else ""
        )
        read = str(found).lower() if isinstance(found, bool) else read
        if read:
            same = written.lower() == read
            return (
                f": write '{written}' in quotes"
                if same
                else f", which YAML reads as {read}: write '{written}' in quotes"
            )
    if isinstance(found, str) and int in members:
        try:
            number = float(found.replace(",", "") if THOUSANDS.fullmatch(found) else found)
        except ValueError:
            return ""
        return f": write {int(number)}" if number.is_integer() and abs(number) < 1e15 else ""
    if isinstance(found, str) and any(get_origin(member) in (list, tuple) for member in members):
        in_list = yaml.safe_dump([found], default_flow_style=True, allow_unicode=True).strip()
        return nearest(found, _choices(annotation)) or f": write {in_list}"
    return ""
