"""Language codes as people write them, on the command line and in recipes, read as the codes of
languages.tsv.

One line on standard error for each place says which codes were read as others, and which codes the table
lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from lsmoe_ds.config.data import LABELLED
from lsmoe_ds.config.method import sections
from lsmoe_ds.directions import GROUPS, Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import (
    CODE,
    check_code,
    find_code,
    is_known,
    language_name,
    nearest,
    normalize_code,
    not_a_code,
)
from lsmoe_ds.notices import listed, notice

# A code whose script and region are written in capitals, as BCP 47 recommends: zh-Hant-TW, es-419.
CAPITALS = r"[a-z]{2,3}(?:[-_][A-Z][a-z]{3})?(?:[-_](?:[A-Z]{2}|[0-9]{3}))?"
TWO_CODES = re.compile(f"({CAPITALS})-({CAPITALS})")
TAG = re.compile(rb"<2([A-Za-z0-9_]{1,40})>")


class Reader:
    """Read a person's spelling of languages as codes of ``own``, or else of the table.

    At the end of a ``with`` block one line on standard error says what was read as another code, and which
    codes the table lacks. Codes of ``own``, and all codes if they are looked up later in a trained system
    (``of_system``), are never reported as lacking. With ``alone``, ``de`` is a direction, too.
    """

    def __init__(self, own: Iterable[str] = (), of_system: bool = False, alone: bool = False) -> None:
        self._own, self._of_system, self._alone = tuple(own), of_system, alone
        self._read: dict[str, str] = {}
        self._unknown: list[str] = []

    def code(self, text: str) -> str:
        """Return the code for a language. Raises UserError for text that is not a code."""
        text = text.strip()
        found = find_code(text, self._own)
        code = found or normalize_code(text)
        check_code(code if CODE.match(code) else text)
        if code != text:
            self._read[text] = code
        if not (found or self._of_system or is_known(code)):
            self._unknown.append(code)
        return code

    def direction(self, text: str) -> Direction:
        """Return a direction such as ``en-de`` or ``eng_Latn-zh-TW``. Raises UserError for any other."""
        text = text.strip()
        if self._alone and "-" not in text:
            return Direction(*[self.code(text)] * 2)
        found = TWO_CODES.fullmatch(text)
        parts = found.groups() if found else tuple(text.split("-"))
        wanted = "write source-target with two different codes, such as en-de"
        if len(parts) != 2 or not all(parts):
            more = (
                "; the parts of a code are joined by underscores, as in en-zh_Hant" if len(parts) > 2 else ""
            )
            raise UserError(f"'{text}' is not a direction: {wanted}{more}")
        source, target = map(self.code, parts)
        if source == target and not self._alone:
            raise UserError(
                f"'{text}' is not a direction: both codes are {source} ({language_name(source)}); {wanted}"
            )
        return Direction(source, target)

    def task(self, text: str) -> str:
        """Return a task, a language or a direction, in our codes."""
        return str(self.direction(text)) if "-" in text else self.code(text)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._say()

    def _say(self) -> None:
        said = []
        if self._read:
            names = {
                code: f" ({language_name(code)})" if is_known(code) else "" for code in self._read.values()
            }
            (first, meant), *rest = self._read.items()
            each = [f"language '{first}' is read as '{meant}'{names[meant]}"]
            each += [f"'{text}' as '{code}'{names[code]}" for text, code in rest]
            said.append(listed(each))
        if unknown := list(dict.fromkeys(self._unknown)):
            languages = (
                f"language '{unknown[0]}' is"
                if len(unknown) == 1
                else f"languages {listed(map(repr, unknown))} are"
            )
            said.append(
                f"{languages} not in the table (docs/languages.md): no name, no script filter, BLEU by 13a"
            )
        if said:
            notice("; ".join(said))


def read_code(text: str, own: Iterable[str] = (), of_system: bool = False) -> str:
    """Return the code for a language; see :class:`Reader`."""
    with Reader(own, of_system) as reader:
        return reader.code(text)


def read_direction(
    text: str, own: Iterable[str] = (), of_system: bool = False, alone: bool = False
) -> Direction:
    """Return a direction; see :class:`Reader`."""
    with Reader(own, of_system, alone) as reader:
        return reader.direction(text)


def read_directions(
    texts: Iterable[str], own: Iterable[str] = (), of_system: bool = False, alone: bool = False
) -> list[Direction]:
    """Return the directions that a command line names; see :class:`Reader`."""
    with Reader(own, of_system, alone) as reader:
        return [reader.direction(text) for text in texts if text.strip()]


def asked_direction(source: str, target: str) -> Direction:
    """Return the direction between two languages from a command line; ``Languages.find`` maps it to a
    system's own codes.
    """
    with Reader(of_system=True) as reader:
        return Direction(reader.code(source), reader.code(target))


def resolve_codes(recipe: Mapping[str, Any], own: Iterable[str] = ()) -> tuple[str, str] | None:
    """Replace the language codes in the mapping of a recipe file by the table's codes, in place.

    A language with a tag in the recipe's vocabulary (``own``) gets the code of that tag, because a trained
    system keeps its codes. Codes in ``corpora`` stay, because files are named by them. Values of wrong types
    are left to the recipe's own checks. Returns None, or the key of a wrong code or of two codes for one
    language, with the error.
    """
    data, model, training = (_section(recipe, name) for name in ("data", "model", "training"))
    corpora = data.get("corpora")
    entries = [each for each in corpora if isinstance(each, dict)] if isinstance(corpora, list) else []
    with Reader(own, alone=any(str(each.get("format")) in LABELLED for each in entries)) as reader:
        places: list[tuple[str, dict[str, Any], type, Callable[[str], str]]] = [
            ("data.languages", data, list, reader.code),
            ("data.directions", data, list, lambda text: str(reader.direction(text))),
            ("training.directions", training, list, lambda text: str(reader.direction(text))),
        ]
        if isinstance(data.get("pivot"), str):
            try:
                data["pivot"] = reader.code(data["pivot"])
            except UserError as error:
                return "data.pivot", str(error)
        places.append(("data.max_pairs", data, dict, reader.code))
        for side in ("encoder", "decoder"):
            moe = _section(_section(model, side), "moe")
            expert = reader.task if moe.get("task") == "pair" else _no_direction(reader.code, data)
            places.append((f"model.{side}.moe.replicas", moe, list, expert))
        groups = _section(data, "groups")
        places += [(f"data.groups.{name}", groups, list, reader.code) for name in groups]
        for method, kind in sections().items():
            given = _section(model, method)
            for name in kind.by_direction:
                pairs, at = _section(given, name), f"model.{method}.{name}"
                try:
                    for key, value in pairs.items():
                        if isinstance(value, str):
                            pairs[key] = str(reader.direction(value))
                except UserError as error:
                    return at, str(error)
                places.append((at, given, dict, lambda text: str(reader.direction(text))))
            for name in kind.by_language:
                *path, key = name.split(".")
                section = reduce(_section, path, given)
                if key == "*":
                    at = f"model.{method}.{path[0]}"
                    places += [(f"{at}.{each}", section, list, reader.code) for each in section]
                    continue
                kind_of = dict if isinstance(section.get(key), dict) else list
                places.append((f"model.{method}.{name}", section, kind_of, _or_group(reader.code)))
        for key, section, shape, read in places:
            name = key.rpartition(".")[2]
            value = section.get(name)
            try:
                if shape is list and isinstance(value, list):
                    section[name] = _read_all(value, read)
                elif shape is dict and isinstance(value, dict):
                    section[name] = dict(zip(_read_all(list(value), read), value.values(), strict=True))
            except UserError as error:
                return key, str(error)
    return _wrong_code_of_corpora(data.get("corpora"))


def _no_direction(read: Callable[[str], str], data: Mapping[str, Any]) -> Callable[[str], str]:
    """Return a reader of codes that raises UserError for a direction between two of the data's languages,
    which it would otherwise read as a language of a region.
    """

    def read_language(text: str) -> str:
        languages, parts = data.get("languages"), text.split("-")
        known = [*languages, "en"] if isinstance(languages, list) else []  # English may be left out
        if len(parts) == 2 and all(part in known for part in parts):
            raise UserError(
                f"'{text}' is a direction, but the tasks of this side are languages, as {parts[1]}"
            )
        return read(text)

    return read_language


def _or_group(read: Callable[[str], str]) -> Callable[[str], str]:
    """Return a reader of codes that returns names of resource groups unchanged. It raises UserError."""

    def read_either(text: str) -> str:
        if text in GROUPS:
            return text
        try:
            return read(text)
        except UserError as error:
            if guess := nearest(text, GROUPS):
                raise UserError(f"'{text}' is no group{guess}, and no language code") from None
            raise error

    return read_either


def _wrong_code_of_corpora(corpora: Any) -> tuple[str, str] | None:
    """Return the key of a ``source`` or ``target`` that is not spelled like a code, with the error."""
    for number, corpus in enumerate(corpora if isinstance(corpora, list) else []):
        for name in ("source", "target"):
            code = corpus.get(name) if isinstance(corpus, dict) else None
            if isinstance(code, str) and not CODE.match(normalize_code(code)):
                return f"data.corpora.{number}.{name}", not_a_code(code)
    return None


def _section(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _read_all(given: Sequence[Any], read: Callable[[str], str]) -> list[Any]:
    """Read each text. Raises UserError if two different texts mean the same."""
    written: dict[str, str] = {}
    found = []
    for item in given:
        if isinstance(item, str):
            meaning = read(item)
            before = written.setdefault(meaning, item)
            if before != item:
                name = "direction" if "-" in meaning else f"language ({language_name(meaning)})"
                raise UserError(f"'{before}' and '{item}' are one {name}, {meaning}: write one of them")
            item = meaning
        found.append(item)
    return found


def mean_the_same(first: Any, second: Any) -> bool:
    """Tell whether two values of ``data.languages`` or ``data.directions`` list the same languages, perhaps
    in other codes.
    """
    if not all(
        isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        for value in (first, second)
    ):
        return False
    meanings = [
        ["-".join(map(normalize_code, text.split("-"))) for text in value] for value in (first, second)
    ]
    return meanings[0] == meanings[1]


def tags_of(recipe: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Return the codes with a tag in a recipe's vocabulary: the file beside a stored recipe, or
    ``data.vocabulary.file``.

    The file is searched for tags, not parsed: whether it is a vocabulary is checked where it is used.
    """
    given = _section(_section(recipe, "data"), "vocabulary").get("file")
    beside = [path.with_name("vocabulary.model")] if path.name == "recipe.yaml" else []
    found: list[str] = []
    for file in [*beside, *([Path(given)] if isinstance(given, str) else [])]:
        try:
            found += [code.decode("ascii") for code in TAG.findall(file.read_bytes())]
        except (OSError, ValueError):
            continue
    return tuple(found)
