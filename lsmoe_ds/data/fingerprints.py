"""Record the files from which data were prepared, and tell whether to prepare them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import MANIFEST, differences
from lsmoe_ds.data.formats import MissingCorpus, name_of
from lsmoe_ds.data.pivot import search_and_join
from lsmoe_ds.data.prepared import check_manifest
from lsmoe_ds.data.sources import PROVENANCE, is_fetched
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_json, sha256, shown

Fingerprint = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class State:
    """Hold the reason why data must be prepared (None if they need not be), and remarks on their corpora."""

    reason: str | None
    remarks: tuple[str, ...] = ()


def _stamps(parts: Sequence[TextPart]) -> Fingerprint:
    """Return the size and modification time of every file, by its path.

    Files of a fetched corpus (``django/de-en.tsv``) have their known checksum instead.
    """
    found: Fingerprint = {}
    for name, path in dict.fromkeys((part.corpus, file) for part in parts for file in part.files):
        if is_fetched(name):
            known = (read_json(path.parent / PROVENANCE) or {"files": {}})["files"][path.name]
            found[f"{name}/{path.name}"] = {**known, "corpus": name}
        elif path.exists():
            stat = path.stat()
            found[str(path)] = {"bytes": stat.st_size, "changed": stat.st_mtime_ns, "corpus": name}
    return found


def corpora_fingerprint(parts: Sequence[TextPart]) -> Fingerprint:
    """Return the size and sha256 of every file that is read, by its path."""
    stamps = _stamps(parts)
    for path, stamp in stamps.items():
        if "sha256" not in stamp:
            stamp["sha256"] = sha256(Path(path))
    return stamps


def _changed_files(old: Fingerprint, now: Fingerprint) -> Iterator[str]:
    for path, stamp in now.items():
        if path not in old:
            yield f"{path} is new"
        elif stamp["bytes"] != old[path]["bytes"] or not _same_bytes(Path(path), stamp, old[path]):
            yield f"{path} has changed"
    for path in old:
        if path not in now:
            yield (
                f"{path} has no more text for the recipe's directions"
                if Path(path).exists()
                else f"{path} is gone"
            )


def _same_bytes(path: Path, stamp: dict[str, Any], old: dict[str, Any]) -> bool:
    if "sha256" in stamp:
        return bool(stamp["sha256"] == old["sha256"])
    return stamp["changed"] == old.get("changed") or sha256(path) == old["sha256"]


def _compare_corpora(recipe: Recipe, old: Fingerprint) -> State:
    """Compare the corpora with those that were prepared.

    A corpus that is no longer on this machine only gives a remark: the data prepared from it remain valid. A
    corpus that exists and cannot be read is a reason to prepare, which then reports the error.
    """
    parts: list[TextPart] = []
    remarks: list[str] = []
    missing: set[str] = set()
    bitexts = sorted({direction.bitext for direction in recipe.languages.directions})
    for corpus in recipe.data.corpora:
        try:
            alone = recipe.data.model_copy(update={"corpora": [corpus]})
            found, _ = search_and_join(alone, bitexts, recipe.prepared)
            parts += [part for each in found for part in each.parts]
        except MissingCorpus as error:
            missing.add(name_of(corpus))
            remarks.append(f"corpus {name_of(corpus)} is not compared with what was prepared: {error}")
        except UserError as error:
            return State(f"corpus {name_of(corpus)} can no longer be read: {error}", tuple(remarks))
    present = {path: stamp for path, stamp in old.items() if stamp.get("corpus") not in missing}
    return State(next(_changed_files(present, _stamps(parts)), None), tuple(remarks))


def state_of(recipe: Recipe) -> State:
    """Tell whether the data of a recipe must be prepared, with remarks on its corpora.

    Prepared data remain valid if their corpora, or the vocabulary's file, are no longer on this machine.
    """
    folder = recipe.prepared
    if not folder.exists():
        return State("it is not there yet")
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return State(f"{folder / MANIFEST} is missing or damaged")
    try:
        check_manifest(folder / MANIFEST, manifest)
    except UserError as error:
        return State(str(error))
    wrong = damage(folder, manifest["files"], verify=True)
    if wrong is not None:
        return State(wrong)
    changed = next(differences(recipe.prepared, manifest["settings"], recipe), None)
    if changed is not None:
        was, now = changed.values()
        return State(f"'{changed.key}' was {was} and is {now}")
    vocabulary, copy = recipe.data.vocabulary.file, manifest["files"]["vocabulary.model"]
    if vocabulary is not None and vocabulary.is_file() and sha256(vocabulary) != copy["sha256"]:
        return State(f"{vocabulary} has changed")
    state = _compare_corpora(recipe, manifest["corpora"])
    if vocabulary is not None and not vocabulary.is_file():
        remark = (
            f"the vocabulary is not compared with what was prepared: there is no file {shown(vocabulary)}"
        )
        state = replace(state, remarks=(*state.remarks, remark))
    return state


def reason_to_prepare(recipe: Recipe) -> str | None:
    """Return the reason why the data of a recipe must be prepared (again), or None if they need not be."""
    return state_of(recipe).reason
