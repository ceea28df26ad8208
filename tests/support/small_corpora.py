"""Small made corpora, in the published layouts, for the tests of the data room."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsmoe_ds.config.data import Cleaning, Corpus
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.formats import find_parts
from lsmoe_ds.data.keys import save_sorted
from lsmoe_ds.data.pieces import Piece
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.shards import FUNCTIONS, Indexed, index_task, shards_of
from lsmoe_ds.data.stages import Work, attempt
from lsmoe_ds.data.summary import show
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.folders import describe_files, write_json

SYLLABLES = {
    "en": ["ta", "ne", "shi", "ro", "lem", "pas", "win", "dor"],
    "de": ["ver", "gen", "scht", "lich", "kei", "ung", "ber", "auf"],
    "fr": ["eau", "oir", "ment", "tion", "que", "elle", "sur", "dans"],
    "ru": ["при", "вет", "сло", "во", "дом", "ник", "ста", "рый"],
}
SPELLED = {"deu_Latn": "de", "eng_Latn": "en", "fra_Latn": "fr", "por_Latn": "fr"}


def sentence(code: str, number: int, words: int = 5) -> str:
    """Return the translation of sentence ``number`` into a made-up language.

    The same code and number always give the same words.
    """
    chance = random.Random(f"{code}{number}")
    return (
        " ".join(
            "".join(chance.choices(SYLLABLES[code], k=chance.randint(2, 4))) for _ in range(words)
        ).capitalize()
        + "."
    )


def pairs(first: str, second: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(sentence(first, number), sentence(second, number)) for number in range(start, start + count)]


def write_fetched(directory: Path, name: str, bitexts: dict[str, list[tuple[str, str]]]) -> None:
    """Write a corpus folder as ``fetch`` leaves it."""
    folder = directory / "corpora" / name
    folder.mkdir(parents=True, exist_ok=True)
    for bitext, content in bitexts.items():
        (folder / f"{bitext}.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in content), encoding="utf-8")
    files = [path.name for path in folder.iterdir() if path.name != "PROVENANCE.json"]
    write_json(folder / "PROVENANCE.json", {"name": name, "files": describe_files(folder, files)})


def found(path: Path, format: Any, *bitexts: str, **given: str) -> list[TextPart]:
    """Return the parts that a corpus of local files has for bitexts."""
    return find_parts([Corpus(path=path, format=format, **given)], path, bitexts)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def recipe(directory: Path, name: str = "small", /, **data: Any) -> Recipe:
    settings = {
        "corpora": ["django"],
        "directory": str(directory),
        "languages": ["de", "fr", "ru"],
        "vocabulary": {"size": 120, "character_coverage": 1.0},
        "held_out": {"dev": 10, "test": 20},
        **data,
    }
    rest = {"model": {"preset": "transformer-tiny"}, "training": {"steps": 1}, "deepspeed": {}}
    return Recipe.model_validate({"name": name, "data": settings, **rest})


def write_three_bitexts(directory: Path, count: int = 300) -> None:
    """django with de, fr and ru; fr lacks some of the sentences, ru has others."""
    bitexts = {
        "de-en": pairs("de", "en", count),
        "en-fr": pairs("en", "fr", count - 50),
        "en-ru": pairs("en", "ru", count, start=40),
    }
    write_fetched(directory, "django", bitexts)


def clean_parts(folder: Path, name: str, parts: list[TextPart], **settings: int) -> Bitext:
    """Index and clean the parts of a bitext, drop its exact copies, and return it.

    The cleaned shards are in a work folder in ``folder``.
    """
    work, bitext = Work(folder / "prepared", FUNCTIONS).folder, Bitext(name, folder / name)
    for stage in ("index", "clean"):
        (work / stage).mkdir(parents=True, exist_ok=True)
    for part in parts:
        files = []
        for path in part.files:
            task = index_task(path)
            record = attempt(work, FUNCTIONS, task)
            assert record is not None
            files.append(Indexed.of(path, record, work / task.name))
        cleaned = []
        for shard in shards_of(part, files):
            task = shard.task(Cleaning.model_validate(settings), bitext.pivot)
            record = attempt(work, FUNCTIONS, task)
            assert record is not None
            cleaned.append((work / task.name, record))
        bitext.add(part, cleaned)
    bitext.drop_copies()
    return bitext


def made_bitext(folder: Path, name: str, keys: list[tuple[int, int]], shard: int = 2) -> Bitext:
    """Return a bitext as cleaning leaves it, in shards of ``shard`` pairs.

    All pairs are different. ``keys`` are the keys of both sides of each pair.
    """
    bitext = Bitext(name, folder / name)
    for start in range(0, len(keys), shard):
        piece = Piece(bitext.folder / str(start), start, len(keys[start : start + shard]))
        piece.folder.mkdir(parents=True)
        numbers = np.arange(start, start + piece.count, dtype=np.uint64)
        save_sorted(piece.folder / "pair", numbers)
        for side in (0, 1):
            own = np.array([pair[side] for pair in keys[start : start + shard]], dtype=np.uint64)
            save_sorted(piece.folder / f"key{side}", own)
        bitext.pieces.append(piece)
    bitext.drop_copies()
    return bitext


def fates_of(bitext: Bitext) -> list[int]:
    return [fate for piece in bitext.pieces for fate in bitext.fate(piece).tolist()]


def keys_of(bitext: Bitext, side: int) -> list[int]:
    return [key for piece in bitext.pieces for key in piece.keys(side).tolist()]


def table(folder: Path, name: str, first: str, second: str, count: int, start: int = 0) -> dict[str, str]:
    """Write a corpus of one table."""
    content = pairs(first, second, count, start)
    write_lines(folder / name, [f"{first}\t{second}", *("\t".join(pair) for pair in content)])
    return {"path": str(folder / name), "format": "tsv"}


def moses(folder: Path, stem: str, count: int, start: int = 0, codes: tuple[str, str] = ("de", "en")) -> None:
    for side, code in enumerate(codes):
        write_lines(folder / f"{stem}.{code}", [pair[side] for pair in pairs(*codes, count, start)])


def notices(settings: Recipe, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what `prepare` says between its first and its last lines; check that `show` says the same."""
    data = prepare(settings)
    said = capsys.readouterr().err
    found: list[str] = data.manifest["notices"]
    assert all(notice in said for notice in found)
    shown = show(settings)
    assert shown.notices == tuple(found)
    assert shown.to_dict()["notices"] == shown.notices
    caption = shown.table().caption
    assert str(caption or "") == "\n".join(found)
    return found


def flores(
    folder: Path,
    count: int,
    start: int,
    codes: Sequence[str] = ("deu_Latn", "eng_Latn"),
    split: str = "devtest",
) -> dict[str, str]:
    for code in codes:
        lines = [sentence(SPELLED[code], number) for number in range(start, start + count)]
        write_lines(folder / split / f"{code}.{split}", lines)
    return {"path": str(folder), "format": "flores"}


def texts(code: str, count: int) -> list[str]:
    return [sentence(code, number) for number in range(count)]


def catalogue(entries: dict[str, str]) -> bytes:
    """Compile a gettext catalogue."""
    texts = [(english.encode(), translation.encode()) for english, translation in sorted(entries.items())]
    data, tables = b"", ([], [])  # type: ignore[var-annotated]
    start = 28 + 16 * len(texts)
    for side in (0, 1):
        for pair in texts:
            tables[side].append(struct.pack("<2I", len(pair[side]), start + len(data)))
            data += pair[side] + b"\0"
    return (
        struct.pack("<7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
        + b"".join(tables[0] + tables[1])
        + data
    )
