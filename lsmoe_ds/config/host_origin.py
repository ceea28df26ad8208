"""Find the name and license of the model of transformers that a recipe uses, from its folder.

A run or converted folder keeps both in ``host/base.json``, with the texts of the license, beside the copies
of configuration and tokenizer, because the folder of the model may be moved or deleted.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lsmoe_ds.config.host import CONFIG, copy_small
from lsmoe_ds.folders import read_json, write_json

ORIGIN = "base.json"
TEXTS = ("LICENSE*", "COPYING*", "NOTICE*")
FETCHED = "PROVENANCE.json"  # of `lsmoe data fetch`
CONVERTED = "provenance.json"  # of `lsmoe convert`


@dataclass(frozen=True)
class Origin:
    """``license`` is a name such as ``apache-2.0``, None if the folder names none."""

    name: str
    license: str | None


def origin_of(folder: Path) -> Origin:
    """Return the name and license of the model in a folder, or of the model from which it has copies."""
    kept = read_json(folder / ORIGIN) or {}
    if isinstance(kept.get("name"), str):
        return Origin(kept["name"], _text(kept.get("license")))
    return Origin(_name(folder), _license(folder))


def license_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that hold its license."""
    return sorted({path.name for pattern in TEXTS for path in folder.glob(pattern) if path.is_file()})


def copy_host(folder: Path, to: Path) -> list[str]:
    """Copy what :func:`copy_small` copies and the license, write ``base.json``; return the files' names."""
    origin, names = origin_of(folder), copy_small(folder, to)
    for name in license_files(folder):
        shutil.copyfile(folder / name, to / name)
        names.append(name)
    write_json(to / ORIGIN, asdict(origin))
    return [*names, ORIGIN]


def _name(folder: Path) -> str:
    """Return the name under which transformers loaded a model before it was saved, or that of the folder."""
    own = folder.resolve()
    if (made := read_json(folder / CONVERTED)) is not None:  # its configuration is a copy of another model's
        return _text(made.get("run")) or own.name
    named = _text((read_json(folder / CONFIG) or {}).get("_name_or_path"))
    if named is None:
        return own.name
    is_path = named.count("/") > 1 or named.startswith((".", "/", "~")) or "\\" in named
    return named.rstrip("/").rpartition("/")[2] if is_path else named  # a path on this machine is private


def _license(folder: Path) -> str | None:
    """Return the license that the model card names in its metadata, or the record of a fetched model."""
    told = _metadata(folder / "README.md")
    license = _text(told.get("license"))
    if license == "other":
        license = _text(told.get("license_name")) or license
    return license or _text((read_json(folder / FETCHED) or {}).get("license"))


def _metadata(card: Path) -> dict[str, Any]:
    """Return the YAML between the lines ``---`` at the head of a model card."""
    try:
        head, *rest = card.read_text(encoding="utf-8").split("\n---", 1)
        found = yaml.safe_load(head.removeprefix("---")) if rest and head.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    """Return a text on one line; None for an empty text or any other value."""
    return " ".join(value.split()) or None if isinstance(value, str) else None
