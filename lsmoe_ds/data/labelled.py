"""Read labelled text: names in WikiANN's or CoNLL's layout, and questions in SQuAD's JSON.

A part yields the pairs of :mod:`lsmoe_ds.data.labels`: a source line, and a line of its labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.data.lines import plain_or_packed, read_lines, read_whole, readable, without_packing
from lsmoe_ds.data.spelling import Wanted
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import find_code, language_name
from lsmoe_ds.notices import counted, notice

SPLITS = {
    "train": "train",
    **dict.fromkeys(("dev", "valid", "validation", "val", "testa"), "dev"),
    **dict.fromkeys(("test", "testb"), "test"),
}
OTHERS = re.compile(r"\.|.*(~|\.swp|\.bak)$")  # names of hidden files and backup copies of editors


@dataclass(frozen=True)
class LabelledPart(TextPart):
    """The labelled text of one corpus in one language and split."""

    def pairs(self, tell: Callable[[str], None] = notice) -> Iterator[tuple[str, str]]:
        for file in self.files:
            if self.reader == "questions":
                yield from _read_questions(file, self.bitext.split("-")[0], tell)
            else:
                yield from _read_words(file, self._prefix(file))

    def _prefix(self, file: Path) -> str:
        return f"{file.parent.name}:" if self.reader == "prefixed" else ""

    def find_tag(self, tags: Collection[str]) -> tuple[Path, int, str]:
        """Return the file and line of the first occurrence of one of these tags, and the tag."""
        lines = (
            (file, number, tag)
            for file in self.files
            for number, _, tag in _read_tags(file, self._prefix(file))
            if tag in tags
        )
        return next(lines)


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name begins with or has as a word."""
    words = re.findall(r"[a-z]+", path.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def find_words(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find a folder for each language, with files ``train``, ``dev`` and ``test`` with any ending."""
    if not corpus.path.is_dir():
        raise UserError(f"{corpus.path} is a file: give the folder of a corpus in the format {corpus.format}")
    inside = sorted(corpus.path.iterdir()) if corpus.path.is_dir() else []
    found = [(path.name, path) for path in inside if path.is_dir()]
    if corpus.source is not None:
        found.append((corpus.source, corpus.path))
    if not found:
        raise UserError(
            f"{corpus.path} is not laid out as {corpus.format}: it has no folder for a language, such as "
            f"{corpus.path / 'de'} with files train, dev and test (or name the language of its files, as in "
            "'source: de')"
        )
    reader = "prefixed" if corpus.format == "wikiann" else "columns"
    for bitext, (code, _) in wanted.items():
        folder = wanted.choose(found, code)
        if folder is None:
            continue
        files: dict[str, list[Path]] = {}
        for path in readable(folder.iterdir()):
            if path.is_file() and not OTHERS.match(path.name) and (split := _split_of(path)) is not None:
                files.setdefault(split, []).append(path)
        for split, several in files.items():
            if len(several) > 1:
                raise UserError(
                    f"{folder} has {counted(len(several), 'file')} of the {split} set, {several[0].name} and "
                    f"{several[1].name}: leave one"
                )
            yield LabelledPart(str(corpus.path), bitext, split, tuple(several), reader)


def _read_words(file: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield sentences: words and tags between spaces."""
    sentence: list[tuple[str, str]] = []
    for _, word, tag in _read_tags(file, prefix):
        if word:
            sentence.append((word, tag))
        elif sentence:
            yield " ".join(word for word, _ in sentence), " ".join(tag for _, tag in sentence)
            sentence = []


def _read_tags(file: Path, prefix: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, word and tag of each line; an empty word ends a sentence.

    The file has one word a line, its tag in the last column, and empty lines between sentences. The
    ``prefix`` of words, if present, is removed.
    """
    number = 0
    for number, line in enumerate(read_lines(file), 1):
        cells = line.rstrip().split("\t") if "\t" in line else line.rstrip().split(" ")
        if not line.strip() or cells[0] == "-DOCSTART-" or line.startswith("# id "):
            yield number, "", ""
            continue
        word, tag = cells[0].removeprefix(prefix), cells[-1].strip()
        if len(cells) < 2 or not word or not tag or len(tag.split()) > 1:
            raise UserError(
                f"{file}, line {number}: a word and its tag with a tab or space between were expected, found "
                f"{line[:40]!r}"
            )
        yield number, "_".join(word.split()) or "_", tag
    yield number, "", ""


def find_questions(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find JSON files whose names have a language and a split, as XTREME's of TyDiQA-GoldP.

    A file whose name has no language, such as the original TyDiQA-GoldP, holds all languages: the id of each
    question begins with the English name of its language.
    """
    here = plain_or_packed(corpus.path)
    inside = (each for ending in ("json", "json.gz", "json.zst") for each in corpus.path.rglob(f"*.{ending}"))
    paths = [here] if here.is_file() else readable(inside)
    files: dict[str, list[tuple[str, Path]]] = {}
    of_all: dict[str, list[Path]] = {}
    codes = {code for _, (code, _) in wanted.items()}
    for path in paths:
        above = [each for each in path.parents if each.is_relative_to(corpus.path)]
        split = next(filter(None, map(_split_of, (path, *above))), "train")
        named = [each for each in _spellings(path) if find_code(each, codes) is not None]
        if corpus.source is not None:
            files.setdefault(split, []).append((corpus.source, path))
        elif named:
            files.setdefault(split, []).append((named[0], path))
        else:
            of_all.setdefault(split, []).append(path)
    if not files and not of_all:
        raise UserError(f"{corpus.path} is not laid out as squad: it has no *.json or *.json.gz")
    for bitext, (code, _) in wanted.items():
        for split in dict.fromkeys(SPLITS.values()):
            own = wanted.choose(files.get(split, []), code)
            chosen = [own] if own is not None else [p for p in of_all.get(split, []) if _has(p, code)]
            if chosen:
                yield LabelledPart(str(corpus.path), bitext, split, tuple(chosen), "questions")


def _spellings(path: Path) -> list[str]:
    """Return the parts of a file's name, and its folder's, that may be a code, the likeliest first."""
    whole = without_packing(path).stem.split(".")
    parts = [part for each in whole for part in re.split(r"[_-]", each)]
    return [each for each in (*reversed(whole), *reversed(parts), path.parent.name) if each]


def _load(file: Path) -> Any:
    try:
        return json.loads(read_whole(file))
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None


def _questions(file: Path) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Yield id, question, context and answers of each question. Raises UserError for another layout."""
    try:
        for article in _load(file)["data"]:
            for paragraph in article["paragraphs"]:
                for each in paragraph["qas"]:
                    answers = [{"text": a["text"], "start": a["answer_start"]} for a in each["answers"]]
                    texts = [each["question"], paragraph["context"], *(a["text"] for a in answers)]
                    "".join(texts).encode()  # raises for half of a surrogate pair
                    if not all(type(a["start"]) is int for a in answers):
                        raise TypeError("an answer_start is no whole number")
                    yield str(each["id"]), each["question"], paragraph["context"], answers
    except (KeyError, TypeError, UnicodeEncodeError) as error:
        raise UserError(f"{file} is not laid out as SQuAD: {type(error).__name__} {error}") from None


def _name_in(number: str) -> str:
    """Return the language that the id of a question begins with, as TyDiQA's do; empty if none."""
    found = re.match(r"([a-z]+)-", number)
    return found[1] if found else ""


def _has(file: Path, code: str) -> bool:
    """Tell whether a file without a language in its name has questions in one."""
    return any(_name_in(number) == language_name(code).lower() for number, *_ in _questions(file))


def _read_questions(file: Path, code: str, tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    name = language_name(code).lower()
    own = {_name_in(number) for number, *_ in _questions(file)}
    by_id = name in own and not any(find_code(each, [code]) for each in _spellings(file))
    without = 0
    for number, question, context, answers in _questions(file):
        if by_id and _name_in(number) != name:
            continue
        for answer in answers:
            start, text = answer["start"], answer["text"]
            if not text.strip():
                raise UserError(
                    f"{file}: question {number} has an empty answer: a question that its context does not "
                    'answer has none, "answers": []'
                )
            if start < 0 or context[start : start + len(text)] != text:
                raise UserError(
                    f"{file}: the answer {text[:40]!r} of question {number} does not stand at character "
                    f"{start} of its context"
                )
        if not answers:
            without += 1
            continue
        source = {"id": number, "question": question, "context": context}
        yield json.dumps(source, ensure_ascii=False), json.dumps(answers, ensure_ascii=False)
    if without:
        tell(f"{file}: left out {counted(without, 'question')} without an answer")
