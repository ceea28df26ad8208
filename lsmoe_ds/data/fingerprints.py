"""What prepared data was made of, and whether that is still so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds.config import Recipe
from lsmoe_ds.data.formats import Part, find_parts
from lsmoe_ds.data.prepared import MANIFEST, check_manifest
from lsmoe_ds.data.sources import PROVENANCE, SOURCES
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_json, sha256

Fingerprint = dict[str, dict[str, Any]]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that prepared data depends on."""
    data = recipe.data.model_dump(mode="json", exclude_none=True)
    return {key: data[key] for key in ("corpora", "directions", "vocabulary", "cleaning", "held_out", "temperature")}


def _stamps(parts: Sequence[Part]) -> Fingerprint:
    """Size and time of change of every file, by its path; of a fetched corpus (``django/de-en.tsv``) the sum that is known."""
    found: Fingerprint = {}
    for name, path in dict.fromkeys((part.corpus, file) for part in parts for file in part.files):
        if name in SOURCES:
            found[f"{name}/{path.name}"] = dict((read_json(path.parent / PROVENANCE) or {"files": {}})["files"][path.name])
        elif path.exists():
            found[str(path)] = {"bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    return found


def corpora_fingerprint(parts: Sequence[Part]) -> Fingerprint:
    """Size and sha256 of every file that is read, by its path."""
    stamps = _stamps(parts)
    for path, stamp in stamps.items():
        if "sha256" not in stamp:
            stamp["sha256"] = sha256(Path(path))
    return stamps


def _changed_files(old: Fingerprint, parts: Sequence[Part]) -> Iterator[str]:
    now = _stamps(parts)
    for path, stamp in now.items():
        if path not in old:
            yield f"{path} is new"
        elif stamp["bytes"] != old[path]["bytes"] or not _same_bytes(Path(path), stamp, old[path]):
            yield f"{path} has changed"
    yield from (f"{path} is gone" for path in old if path not in now)


def _same_bytes(path: Path, stamp: dict[str, Any], old: dict[str, Any]) -> bool:
    if "sha256" in stamp:
        return bool(stamp["sha256"] == old["sha256"])
    return stamp["changed"] == old.get("changed") or sha256(path) == old["sha256"]


def _changed_settings(old: Any, new: Any, at: str = "data") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _changed_settings(old.get(key), new.get(key), f"{at}.{key}")
    elif old != new:
        yield f"'{at}' was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def reason_to_prepare(recipe: Recipe) -> str | None:
    """Why the data of a recipe must be prepared (again), None if it need not be.

    Prepared data whose corpora, or file of the vocabulary, are no longer on this machine is good as it is.
    """
    folder = recipe.prepared
    if not folder.exists():
        return "it is not there yet"
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or damaged"
    try:
        check_manifest(folder / MANIFEST, manifest)
    except UserError as error:
        return str(error)
    wrong = damage(folder, manifest["files"], verify=False)
    if wrong is not None:
        return wrong
    changed = next(_changed_settings(manifest["settings"], settings_of(recipe)), None)
    if changed is not None:
        return changed
    vocabulary, copy = recipe.data.vocabulary.file, manifest["files"]["vocabulary.model"]
    if vocabulary is not None and vocabulary.is_file() and sha256(vocabulary) != copy["sha256"]:
        return f"{vocabulary} has changed"
    try:
        parts = find_parts(recipe.data.corpora, recipe.data.directory, sorted({d.bitext for d in recipe.languages.directions}))
    except UserError:
        return None
    return next(_changed_files(manifest["corpora"], parts), None)
