"""Compare recipes with prepared data: find the data, check the settings that they depend on, and check that
they are those of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_fields, read_json, sha256

MANIFEST = "manifest.json"
# of a run: the folder to which its recipe's paths are relative, and a digest of the prepared data
ORIGIN = "origin.json"
VOCABULARY = "vocabulary.model"
UNUSED_WITH_FILE = ("character_coverage", "sentences")  # settings of a vocabulary that is trained
LONGEST = 150  # characters of a value in a sentence


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe on which prepared data depend, in the types of JSON."""
    data = recipe.data.model_dump(mode="json", exclude_none=True)
    settings = {key: data[key] for key in ("corpora", "directions", "vocabulary", "cleaning", "held_out")}
    settings |= {
        key: data[key] for key in ("pivot", "max_pairs", "train_on", "labels", "stride") if key in data
    }
    if recipe.data.task != "translate":  # long texts are cut before training
        settings["batch"] = {"max_length": data["batch"]["max_length"]}
    if recipe.data.vocabulary.file is None:
        return settings | {
            "temperature": data["temperature"]
        }  # the vocabulary is trained on a sample that follows it
    used = {key: value for key, value in data["vocabulary"].items() if key not in UNUSED_WITH_FILE}
    return settings | {"vocabulary": used}


@dataclass(frozen=True)
class Difference:
    """A setting, such as ``data.vocabulary.size``, that has changed since the data were prepared.

    A value is None where it is not set.
    """

    key: str
    was: Any
    now: Any

    def values(self) -> tuple[str, str]:
        """Format both values (was, now); for long lists only the items that the other one lacks."""
        was, now = self.was, self.now
        if isinstance(was, list) and isinstance(now, list) and max(len(str(was)), len(str(now))) > LONGEST:
            was, now = (
                [each for each in was if each not in now] or was,
                [each for each in now if each not in was] or now,
            )
        return _short(was), _short(now)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = ", ".join(map(_item, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _item(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return f"{value.get('path')} ({', '.join(str(each) for key, each in value.items() if key != 'path')})"


def differences(
    folder: Path, prepared: Mapping[str, Any], recipe: Recipe, fewer: bool = False
) -> Iterator[Difference]:
    """Yield the differences between a recipe and the ``settings`` of the prepared data in ``folder``.

    The order of directions is no difference, nor is the origin of the vocabulary if its file has the content
    of the prepared one.
    With ``fewer`` the recipe may name fewer directions than were prepared.
    """
    now, was = settings_of(recipe), dict(prepared)
    file = recipe.data.vocabulary.file
    if (
        file is not None
        and file.is_file()
        and (folder / VOCABULARY).is_file()
        and sha256(file) == sha256(folder / VOCABULARY)
    ):
        was["vocabulary"] = {key: (was.get("vocabulary") or {}).get(key) for key in now["vocabulary"]} | {
            "file": now["vocabulary"]["file"]
        }
        was.pop("temperature", None)  # only the sample that a vocabulary is trained on follows it
    for settings in (now, was):
        directions = settings.get("directions")
        settings["directions"] = sorted(map(str, directions)) if isinstance(directions, list) else directions
    if fewer and set(now["directions"]) <= set(was["directions"] or ()):
        was["directions"] = now["directions"]
    yield from _differences(was, now, "data")


def _differences(was: Any, now: Any, at: str) -> Iterator[Difference]:
    if isinstance(was, dict) and isinstance(now, dict):
        # with a file of the vocabulary other settings differ too: the file comes first
        for key in sorted(dict.fromkeys([*now, *was]), key=lambda key: key != "file"):
            yield from _differences(was.get(key), now.get(key), f"{at}.{key}")
    elif was != now:
        yield Difference(at, was, now)


def check_settings(
    folder: Path, prepared: Mapping[str, Any], recipe: Recipe, home: Path | None = None
) -> None:
    """Raise UserError, with the key and both values, unless the data in ``folder`` were prepared as the
    recipe says.

    ``home`` is the run or converted folder that the recipe is from; a converted folder serves some of the
    directions.
    """
    found = next(differences(folder, prepared, recipe, fewer=home is not None), None)
    if found is None:
        return
    was, now = found.values()
    todo = "set it back, run 'lsmoe data prepare' on the recipe, or give it a 'data.name' of its own"
    if home is not None:
        todo = (
            f"they were prepared anew for another recipe; 'lsmoe data prepare {home / 'recipe.yaml'}' makes "
            "them anew"
        )
    before = f"was prepared with {was}" if found.was is not None else "was prepared without it"
    given = f"is {now}" if found.now is not None else "is not set"
    raise UserError(f"'{found.key}' {given}, but {folder} {before}: {todo}")


def digest(manifest: Mapping[str, Any]) -> str:
    """Return one checksum for all files of prepared data."""
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def read_origin(home: Path) -> dict[str, Any]:
    """Read where a run was started and on which data; empty for a converted folder or a run of an older
    version.
    """
    if not (home / ORIGIN).is_file():
        return {}
    origin = read_json(home / ORIGIN)
    check_fields(home / ORIGIN, origin, directory=str, data=str)
    return origin or {}


def describe_origin(prepared: Path) -> dict[str, str] | None:
    """Return the ``origin.json`` of a run that starts now on the data in ``prepared``; None if no data are
    prepared.
    """
    manifest = read_json(prepared / MANIFEST)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return None
    vocabulary = (manifest["files"].get(VOCABULARY) or {}).get("sha256", "")
    return {"directory": str(Path.cwd()), "data": digest(manifest), "vocabulary": vocabulary}


def check_vocabulary(home: Path, sha: object) -> None:
    """Raise UserError if the vocabulary of a run or converted folder is missing, or if its checksum is not
    ``sha``, where one was recorded: the model would read other pieces than it was trained on.
    """
    file = home / VOCABULARY
    if not file.is_file():
        raise UserError(f"{home} is damaged: {file} is missing")
    if isinstance(sha, str) and sha and sha256(file) != sha:
        raise UserError(
            f"{home} is damaged: {file} is not as it was written (sha256 differs): take it from a copy, or "
            "from the data"
        )


def check_trained_on(home: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError if a run or converted folder was trained on other data than those in ``folder``: it may
    have seen their test sentences.
    """
    copied = home / VOCABULARY
    if copied.is_file() and sha256(folder / VOCABULARY) != sha256(copied):
        raise UserError(
            f"the vocabulary in {folder} is not that of {home}: it was prepared anew after this training "
            "began"
        )
    if read_origin(home).get("data", digest(manifest)) != digest(manifest):
        raise UserError(
            f"the text in {folder} is not what {home} was trained on: it was prepared anew after this "
            "training began, from other corpora, so that its dev and test sentences may be others"
        )


def data_directories(recipe: Recipe, home: Path | None = None) -> list[Path]:
    """List the possible paths of ``data.directory``, most likely first.

    A relative path is relative to the working directory. For a recipe in a run or converted folder ``home``,
    the folders above ``home`` come first (so that a copied project works), then the folder in which the
    training was started, then the working directory.
    """
    directory = recipe.data.directory
    if directory.is_absolute() or home is None:
        return [directory]
    started = read_origin(home).get("directory")
    bases = [*home.resolve().parents, *([Path(started)] if started else []), Path.cwd()]
    return list(dict.fromkeys(base / directory for base in bases))


def find_directory(recipe: Recipe, home: Path) -> Path:
    """Return the ``data.directory`` of a run or converted folder: the first of :func:`data_directories` that
    exists.
    """
    candidates = data_directories(recipe, home)
    return next((each for each in candidates if each.is_dir()), recipe.data.directory)
