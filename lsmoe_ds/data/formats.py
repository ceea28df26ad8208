"""Read parallel text: the layouts of OPUS-100, FLORES, NTREX-128 and IWSLT, aligned files (Moses), tables
(TSV), translation memories (TMX) and translations by a model.

:mod:`lsmoe_ds.data.lines` and :mod:`lsmoe_ds.data.iwslt` read the single files.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.data.labelled import find_questions, find_words
from lsmoe_ds.data.lines import plain_or_packed, read_lines, readable, without_packing
from lsmoe_ds.data.sources import check_source, corpus_damage, corpus_folder
from lsmoe_ds.data.spelling import Half, Pair, Wanted, say_spellings
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tmx import find_tmx
from lsmoe_ds.data.zipped import ZippedReader, names_in
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import shown
from lsmoe_ds.languages import find_code, is_known, normalize_code, same_language

SPLITS = ("train", "dev", "test")


class MissingCorpus(UserError):
    """Raised for a corpus that is not on this machine; one that cannot be read raises UserError."""


def name_of(corpus: str | Corpus) -> str:
    """Return the name of a corpus in messages and in ``Part.corpus``: its name, or its path."""
    return corpus if isinstance(corpus, str) else str(corpus.path)


@dataclass(frozen=True)
class Search:
    """Hold the text wanted from one corpus, and the parts found in it."""

    wanted: Wanted
    parts: list[TextPart]


def search(corpora: Iterable[str | Corpus], directory: Path, bitexts: Iterable[str]) -> list[Search]:
    """Find everything that the corpora have for the bitexts, in the order of the recipe.

    Raises MissingCorpus for a corpus that is not on this machine, UserError for one that is damaged or has a
    wrong layout.
    """
    pairs = {name: (pair[0], pair[1]) for name in bitexts if (pair := name.split("-"))}
    return [_search(corpus, directory, pairs) for corpus in corpora]


def find_parts(corpora: Iterable[str | Corpus], directory: Path, bitexts: Iterable[str]) -> list[TextPart]:
    """List everything that the corpora have for the bitexts, and report how they spell codes.

    See :func:`search`.
    """
    found = search(corpora, directory, bitexts)
    say_spellings(each.wanted for each in found)
    return [part for each in found for part in each.parts]


def _search(corpus: str | Corpus, directory: Path, pairs: Mapping[str, Pair]) -> Search:
    if isinstance(corpus, str):
        wanted = Wanted(corpus, pairs)
        return Search(wanted, list(_fetched(corpus, directory, wanted)))
    if not plain_or_packed(corpus.path).exists() and corpus.format != "moses":
        raise MissingCorpus(f"there is no corpus {shown(corpus.path)}")
    wanted = Wanted(str(corpus.path), pairs, (corpus.source, corpus.target))
    return Search(wanted, list(FORMATS[corpus.format](corpus, wanted)))


def _fetched(name: str, directory: Path, wanted: Wanted) -> Iterator[TextPart]:
    check_source(name, _hint_at_path(name))
    wrong = corpus_damage(name, directory)
    if wrong is not None:
        kind = UserError if corpus_folder(name, directory).exists() else MissingCorpus
        raise kind(f"corpus {name} is not fetched ({wrong}): run 'lsmoe data fetch {name}'")
    files = [
        path for path in sorted(corpus_folder(name, directory).glob("*-*.tsv")) if path.stem.count("-") == 1
    ]
    for bitext, pair in wanted.items():
        if found := wanted.choose_all(_both_ways(files), pair):
            yield TextPart(
                name, bitext, "train", (found,), "table", (0, 1) if _in_order(found, pair) else (1, 0)
            )


def _hint_at_path(name: str) -> str:
    """Return a hint at ``path:`` if a corpus' name is that of local files, otherwise an empty string."""
    folder = os.path.isdir(os.path.dirname(name) or ".")
    if not name or not (os.path.exists(name) or (folder and glob.glob(f"{glob.escape(name)}.*"))):
        return ""
    formats = ", ".join(FORMATS)
    return f"; for the text in {name} write {{path: {name}, format: F}}, where F is one of {formats}"


def _in_order(path: Path, pair: tuple[str, str]) -> bool:
    """Tell whether the name of a pair's path has the pair's first language first."""
    return find_code(path.stem.split("-")[0], pair) == pair[0]


def _both_ways(paths: Iterable[Path]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield each path with the two codes in its name (``de-en``), and again with the codes reversed."""
    for path in paths:
        codes = tuple(path.stem.split("-"))
        yield from ((codes, path), (codes[::-1], path))


def _aligned(
    wanted: Wanted, split: str, reader: str, name: str, files: list[tuple[str, Path]]
) -> Iterator[TextPart]:
    """Find what aligned files, listed by their languages, have for each bitext.

    ``name`` is the common part of their names. Bitexts with only one side are recorded in ``wanted``.
    """
    halves, complete = [], False
    for bitext, pair in wanted.items():
        first, second = wanted.choose(files, pair[0]), wanted.choose(files, pair[1])
        if first and second:
            complete = True
            yield TextPart(wanted.corpus, bitext, split, (first, second), reader)
        elif there := first or second:
            halves.append(Half(split, bitext, there.name, pair[1] if first else pair[0]))
    wanted.note_halves(halves, complete, name, [code for code, _ in files])


def _opus100(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    folders = [folder for name in ("supervised", "zero-shot") if (folder := corpus.path / name).is_dir()]
    if not folders:
        raise UserError(
            f"{corpus.path} is not laid out as OPUS-100: it has neither 'supervised' nor 'zero-shot' in it"
        )
    present = [
        folder
        for kind in folders
        for folder in sorted(kind.iterdir())
        if folder.is_dir() and folder.name.count("-") == 1
    ]
    for bitext, pair in wanted.items():
        if chosen := wanted.choose_all(_both_ways(present), pair):
            codes = chosen.name.split("-")
            codes = codes if _in_order(chosen, pair) else codes[::-1]
            for split in SPLITS:
                files = tuple(
                    plain_or_packed(chosen / f"opus.{chosen.name}-{split}.{code}") for code in codes
                )
                if any(file.exists() for file in files):
                    yield TextPart(str(corpus.path), bitext, split, files, "lines")


def _flores(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find the files of FLORES-200, ``dev/deu_Latn.dev``, or of FLORES+, ``dev/dev.deu_Latn``."""
    sets = {"dev": corpus.path / "dev", "devtest": corpus.path / "devtest"}
    if not any(folder.is_dir() for folder in sets.values()):
        raise UserError(f"{corpus.path} is not laid out as FLORES: it has neither 'dev' nor 'devtest' in it")
    for name, folder in sets.items():
        files = []
        for path in readable(folder.glob("*")):
            plain = without_packing(path)
            if plain.suffix == f".{name}":
                files.append((plain.stem, path))
            elif plain.stem == name:
                files.append((plain.suffix[1:], path))
        split = "dev" if name == "dev" else "test"
        yield from _aligned(wanted, "train" if split == corpus.train else split, "lines", name, files)


NTREX_FILE = re.compile(r"(.+)-(src|ref)\.([^.]+)\.txt")


def _ntrex(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find the files of one test set in many languages.

    They are ``newstest2019-src.eng.txt`` and ``newstest2019-ref.deu.txt``, ``newstest2019-ref.zho-CN.txt``,
    and so on. English is the file of the sources, not one of its translations into British or Indian English.
    """
    folder = corpus.path / "NTREX-128" if (corpus.path / "NTREX-128").is_dir() else corpus.path
    found: dict[str, list[tuple[str, Path]]] = {"src": [], "ref": []}
    for path in readable(folder.iterdir() if folder.is_dir() else ()):
        if match := NTREX_FILE.fullmatch(without_packing(path).name):
            found[match[2]].append((match[3], path))
    if not found["src"] or not found["ref"]:
        raise UserError(
            f"{corpus.path} is not laid out as NTREX-128: it has no newstest2019-src.eng.txt and "
            "newstest2019-ref.deu.txt"
        )
    for bitext, pair in wanted.items():
        first, second = (
            wanted.choose(found["src"], code) or wanted.choose(found["ref"], code) for code in pair
        )
        if first and second:
            split = "train" if corpus.train == "test" else "test"
            yield TextPart(str(corpus.path), bitext, split, (first, second), "lines")


IWSLT_TRAIN = re.compile(r"(?P<set>train\.tags\.[\w@-]+)\.(?P<code>[\w@-]+)")  # train.tags.en-pt-br.pt-br
IWSLT_SET = re.compile(r"(?P<set>IWSLT\w*\.\w+\.(?P<kind>dev|tst)\w*\.[\w@-]+)\.(?P<code>[\w@-]+)\.xml")


def _iwslt(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    found: dict[tuple[str, str, str], list[tuple[str, Path]]] = {}
    for path in readable(corpus.path.rglob("*")):
        if match := IWSLT_TRAIN.fullmatch(without_packing(path).name):
            found.setdefault(("train", "tagged", f"{path.parent}/{match['set']}"), []).append(
                (match["code"], path)
            )
        elif match := IWSLT_SET.fullmatch(without_packing(path).name):
            split = "dev" if match["kind"] == "dev" else "test"
            found.setdefault((split, "segments", f"{path.parent}/{match['set']}"), []).append(
                (match["code"], path)
            )
    if not found:
        raise UserError(
            f"{corpus.path} is not laid out as IWSLT: no train.tags.de-en.de and no "
            "IWSLT14.TED.dev2010.de-en.de.xml was found in it"
        )
    for (split, reader, name), files in found.items():
        yield from _aligned(wanted, split, reader, name, files)


DEV_WORDS = {"dev", "devset", "newsdev", "val", "valid", "validation"}
TEST_WORDS = {"test", "testset", "newstest", "tst", "devtest"}


def split_of(stem: str) -> str:
    """Return the split of files ``STEM.CODE`` by the words in ``STEM``, which docs/data.md lists."""
    words = set(re.findall(r"[a-z]+", stem.lower()))
    return "test" if words & TEST_WORDS else "dev" if words & DEV_WORDS else "train"


def _moses(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find aligned files.

    ``path`` is the common part of two names (``corpus/train`` for ``corpus/train.de``), or the files' folder;
    ``.txt`` may follow the code. In a folder the stems decide which files are dev and test sets
    (:func:`split_of`). If ``path`` is a stem, its files are training text.
    """
    recipes = {code for pair in wanted.bitexts.values() for code in pair}
    if corpus.path.suffix == ".zip":
        yield from _zipped(corpus, wanted, recipes)
        return
    folder = corpus.path if corpus.path.is_dir() else corpus.path.parent
    stems: dict[str, list[tuple[str, Path]]] = {}
    for path in readable(folder.glob("*.*") if folder.is_dir() else ()):
        stem, spelling, text = _stem_and_code(path, recipes)
        bare = without_packing(path).with_suffix("")  # takes precedence over the file with .txt
        hidden = text and plain_or_packed(bare).is_file()
        if path.is_file() and not hidden and (corpus.path.is_dir() or stem == corpus.path.name):
            stems.setdefault(stem, []).append((spelling, path))
    if not stems:
        name = f"{corpus.path / 'STEM'}.CODE" if corpus.path.is_dir() else f"{corpus.path}.CODE"
        raise MissingCorpus(
            f"there are no files {name}, such as {name.removesuffix('CODE')}en, in "
            f"{folder.absolute()}{_hint(corpus.path, recipes)}"
        )
    wanted.restrict()
    if not corpus.path.is_dir():
        for code in (corpus.source, corpus.target):
            if code and not any(same_language(code, other) for other, _ in stems[corpus.path.name]):
                raise UserError(f"there is no file {shown(Path(f'{corpus.path}.{code}'))}")
    for stem, files in stems.items():
        split = split_of(stem) if corpus.path.is_dir() else "train"
        yield from _aligned(wanted, split, "lines", stem, files)


def _zipped(corpus: Corpus, wanted: Wanted, recipes: Iterable[str]) -> Iterator[TextPart]:
    """Find the aligned files in a zip, as OPUS calls them: ``Books.de-en.de``, ``Books.de-en.en``."""
    stems: dict[str, list[tuple[str, str]]] = {}
    for name in names_in(corpus.path):
        stem, code, _ = _stem_and_code(Path(name), recipes)
        if _names_language(code, recipes):
            stems.setdefault(str(Path(name).with_name(stem)), []).append((code, name))
    if not any(len(files) > 1 for files in stems.values()):
        raise UserError(
            f"{corpus.path} has no two aligned files in it, such as Books.de-en.de and Books.de-en.en"
        )
    for stem, files in stems.items():
        for bitext, pair in wanted.items():
            first, second = (wanted.choose(files, code) for code in pair)
            if first and second:
                read = ZippedReader(corpus.path, first, second)
                split = split_of(Path(stem).name)
                yield TextPart(str(corpus.path), bitext, split, (corpus.path,), "pairs", read=read)


def _stem_and_code(path: Path, recipes: Iterable[str]) -> tuple[str, str, bool]:
    """Split the name of an aligned file: return its stem, its language code, and whether ``.txt`` follows."""
    plain = without_packing(path)
    if text := plain.suffix == ".txt" and _names_language(Path(plain.stem).suffix[1:], recipes):
        plain = Path(plain.stem)
    return plain.stem, plain.suffix[1:], text


def _hint(path: Path, recipes: Iterable[str]) -> str:
    """Return a hint at the ending if ``path`` is one of two aligned files, otherwise an empty string."""
    stem, code, _ = _stem_and_code(path, recipes)
    if not plain_or_packed(path).is_file() or not is_known(normalize_code(code)):
        return ""
    without = f"write 'path: {path.with_name(stem)}', without the ending that names its language"
    return f"; {path} is a file itself: {without}"


def _tsv(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    if bool(corpus.source) != bool(corpus.target):
        raise UserError(
            f"corpus {corpus.path}: a tsv names both 'source' and 'target', or neither (then its first line "
            "names the columns)"
        )
    path, codes = plain_or_packed(corpus.path), [corpus.source or "", corpus.target or ""]
    first = next(read_lines(path), "").split("\t")
    # A first line that names both languages is a header, not text, and decides the order of the columns even
    # if the recipe names the languages.
    header = not corpus.source or all(find_code(code, map(str.strip, first)) for code in codes)
    if header:
        codes = first
        if len(codes) < 2:
            raise UserError(
                f"{path}, line 1: two or more language codes between tabs were expected, found "
                f"{codes[0][:40]!r}"
            )
        recipes = {code for pair in wanted.bitexts.values() for code in pair}
        if sum(_names_language(cell, recipes) for cell in codes) < 2:
            found = ", ".join(repr(cell[:30]) for cell in codes[:2])
            todo = (
                "write a first line of language codes between tabs, or 'source:' and 'target:' in the recipe "
                "if there is none"
            )
            if sum(_names_language(cell.strip().strip('"'), recipes) for cell in codes) > 1:
                todo = "quote marks are text here: write the table without quotes around its fields"
            raise UserError(f"{path}, line 1 names no languages (found {found}): {todo}")
    for bitext, pair in wanted.items():
        columns = [
            wanted.choose([(code.strip(), i) for i, code in enumerate(codes)], member) for member in pair
        ]
        if columns[0] is not None and columns[1] is not None:
            yield TextPart(
                str(corpus.path),
                bitext,
                "train",
                (path,),
                "table",
                (columns[0], columns[1]),
                header,
                len(codes),
            )


def _translated(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find translations by a model: ``SOURCE-TARGET.tsv``, which trains only that direction."""
    files = sorted(corpus.path.glob("*-*.tsv")) if corpus.path.is_dir() else []
    named = [((first, second), path) for path in files for first, _, second in [path.stem.partition("-")]]
    if not named:
        raise UserError(
            f"{corpus.path} is not laid out as text that a model translated: it is no folder of files "
            "such as en-de.tsv, which `lsmoe translate --corpus` writes"
        )
    for bitext, pair in wanted.items():
        for codes, columns in ((pair, (0, 1)), (pair[::-1], (1, 0))):
            if found := wanted.choose_all(named, codes):
                way = "-".join(codes)
                yield TextPart(str(corpus.path), bitext, "train", (found,), "table", columns, way=way)


def _names_language(cell: str, recipes: Iterable[str]) -> bool:
    """Tell whether a cell of a first line is a language code: one of the recipe's, or a known one."""
    code = cell.strip()
    return 0 < len(code) <= 20 and (find_code(code, recipes) is not None or is_known(normalize_code(code)))


FORMATS: dict[str, Callable[[Corpus, Wanted], Iterator[TextPart]]] = {
    "opus100": _opus100,
    "flores": _flores,
    "ntrex": _ntrex,
    "iwslt": _iwslt,
    "moses": _moses,
    "tmx": find_tmx,
    "tsv": _tsv,
    "translated": _translated,
    "wikiann": find_words,
    "conll": find_words,
    "squad": find_questions,
}
