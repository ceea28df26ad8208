from pathlib import Path
from typing import Any

import pytest
from small_corpora import pairs, sentence, write_lines

from lsmoe_ds.config import Corpus
from lsmoe_ds.data.formats import Part, find_parts
from lsmoe_ds.errors import UserError


def found(path: Path, format: Any, *bitexts: str, **given: str) -> list[Part]:
    return find_parts([Corpus(path=path, format=format, **given)], path, bitexts)


def texts(code: str, count: int) -> list[str]:
    return [sentence(code, number) for number in range(count)]


def write_aligned(stem: Path, first: str, second: str, count: int) -> None:
    for code in (first, second):
        write_lines(stem.with_name(f"{stem.name}.{code}"), texts(code, count))


def test_opus100(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("dev", 2), ("test", 3)):
        write_aligned(tmp_path / "supervised/de-en" / f"opus.de-en-{split}", "de", "en", count)
    write_aligned(tmp_path / "zero-shot/de-fr/opus.de-fr-test", "de", "fr", 4)
    parts = found(tmp_path, "opus100", "de-en", "de-fr")
    assert [(p.bitext, p.split, len(list(p.pairs()))) for p in parts] == [
        ("de-en", "train", 5), ("de-en", "dev", 2), ("de-en", "test", 3), ("de-fr", "test", 4)
    ]  # fmt: skip
    assert list(parts[1].pairs()) == pairs("de", "en", 2)


def test_opus100_prefers_the_code_as_written(tmp_path: Path) -> None:
    for code, count in (("nb", 2), ("no", 3)):
        for side, lines in (("en", texts("en", count)), (code, texts("de", count))):
            write_lines(tmp_path / f"supervised/en-{code}" / f"opus.en-{code}-train.{side}", lines)
    assert len(list(found(tmp_path, "opus100", "en-no")[0].pairs())) == 3
    assert len(list(found(tmp_path, "opus100", "en-nb")[0].pairs())) == 2


@pytest.mark.parametrize("names", [("deu", "eng"), ("deu_Latn", "eng_Latn")])
def test_flores_of_either_year(tmp_path: Path, names: tuple[str, str]) -> None:
    for folder, count in (("dev", 2), ("devtest", 3)):
        for name, code in zip(names, ("de", "en"), strict=True):
            write_lines(tmp_path / folder / f"{name}.{folder}", texts(code, count))
    parts = found(tmp_path, "flores", "de-en", "en-fr")
    assert [(p.bitext, p.split, list(p.pairs())) for p in parts] == [
        ("de-en", "dev", pairs("de", "en", 2)),
        ("de-en", "test", pairs("de", "en", 3)),
    ]


def test_iwslt(tmp_path: Path) -> None:
    for code in ("de", "en"):
        lines = [
            "<url>http://x</url>",
            "<title>A title</title>",
            *texts(code, 2),
            "<translator>only in one</translator>" if code == "de" else "",
        ]
        write_lines(tmp_path / f"train.tags.de-en.{code}", [line for line in lines if line])
        xml = ['<?xml version="1.0"?>', '<!DOCTYPE x [<!ENTITY big "boom">]>', "<mteval>", "<doc>"]
        xml += [f'<seg id="{i}"> {text} Q&amp;A &big; </seg>' for i, text in enumerate(texts(code, 2), 1)]
        write_lines(tmp_path / f"IWSLT14.TED.dev2010.de-en.{code}.xml", xml)
        write_lines(tmp_path / f"IWSLT14.TED.tst2011.de-en.{code}.xml", xml)
    train, *held = sorted(found(tmp_path, "iwslt", "de-en"), key=lambda part: part.split == "train", reverse=True)
    assert list(train.pairs()) == [("A title", "A title"), *pairs("de", "en", 2)]
    assert {part.split for part in held} == {"dev", "test"}
    assert next(iter(held[0].pairs())) == (f"{sentence('de', 0)} Q&A &big;", f"{sentence('en', 0)} Q&A &big;")


def test_moses_and_tsv(tmp_path: Path) -> None:
    write_aligned(tmp_path / "news", "de", "en", 3)
    assert list(found(tmp_path / "news", "moses", "de-en", source="de", target="en")[0].pairs()) == pairs("de", "en", 3)
    write_aligned(tmp_path / "sets/valid", "de", "en", 2)
    assert [p.split for p in found(tmp_path / "sets", "moses", "de-en")] == ["dev"]
    write_lines(tmp_path / "x.tsv", ["en\tfr\tde", "Hello\tBonjour\tHallo"])
    assert list(found(tmp_path / "x.tsv", "tsv", "de-en")[0].pairs()) == [("Hallo", "Hello")]
    write_lines(tmp_path / "y.tsv", ["Hello\tHallo"])
    assert list(found(tmp_path / "y.tsv", "tsv", "de-en", source="en", target="de")[0].pairs()) == [("Hallo", "Hello")]


def bad(tmp_path: Path, case: str) -> list[Part]:
    stem = tmp_path / "news"
    write_aligned(stem, "de", "en", 3)
    match case:
        case "shorter":
            write_lines(tmp_path / "news.en", texts("en", 2))
        case "encoding":
            (tmp_path / "news.en").write_bytes(b"good\nbad \xff here\nmore\n")
        case "empty":
            (tmp_path / "news.de").write_text("")
            (tmp_path / "news.en").write_text("")
        case "one missing":
            (tmp_path / "news.en").unlink()
        case "binary":
            (tmp_path / "news.en").write_bytes(b"a" * (2 << 20))
        case "no folder":
            return found(tmp_path / "nowhere", "opus100", "de-en")
        case "no opus":
            return found(tmp_path, "opus100", "de-en")
        case "no flores":
            return found(tmp_path, "flores", "de-en")
        case "no iwslt":
            return found(tmp_path, "iwslt", "de-en")
        case "no moses":
            return found(tmp_path / "other", "moses", "de-en")
        case "columns":
            write_lines(tmp_path / "x.tsv", ["one\ttwo", "only one"])
            return found(tmp_path / "x.tsv", "tsv", "de-en", source="de", target="en")
        case "header":
            write_lines(tmp_path / "x.tsv", ["no tab here"])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "half named":
            write_lines(tmp_path / "x.tsv", ["one\ttwo"])
            return found(tmp_path / "x.tsv", "tsv", "de-en", source="de")
        case "not fetched":
            return find_parts(["django"], tmp_path, ["de-en"])
        case "unknown name":
            return find_parts(["djanga"], tmp_path, ["de-en"])
    return found(stem, "moses", "de-en", source="de", target="en")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("shorter", r"news.en has 2 lines but .*news.de has more"),
        ("encoding", r"news.en, line 2: not UTF-8 \(byte 0xff at position 4\)"),
        ("empty", r"hold no text"),
        ("one missing", r"there is no file .*news.en"),
        ("binary", r"news.en, line 1: the line is longer"),
        ("no folder", r"there is no corpus .*nowhere"),
        ("no opus", r"not laid out as OPUS-100"),
        ("no flores", r"not laid out as FLORES"),
        ("no iwslt", r"not laid out as IWSLT"),
        ("no moses", r"there are no files .*other.CODE"),
        ("columns", r"x.tsv, line 2: 2 columns between tabs were expected, found 1"),
        ("header", r"x.tsv, line 1: two or more language codes"),
        ("half named", r"both 'source' and 'target'"),
        ("not fetched", r"run 'lsmoe data fetch django'"),
        ("unknown name", r"did you mean 'django'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, case: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        for part in bad(tmp_path, case):
            list(part.pairs())
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes("\ufeffen\tde\r\nHello\tHallo\r\n".encode())
    assert list(found(tmp_path / "x.tsv", "tsv", "de-en")[0].pairs()) == [("Hallo", "Hello")]


def test_separators_within_a_line_do_not_misalign(tmp_path: Path) -> None:
    write_lines(tmp_path / "n.de", ["eins\u2028noch eins", "zwei"])
    write_lines(tmp_path / "n.en", ["one\x0cmore", "two"])
    assert len(list(found(tmp_path / "n", "moses", "de-en")[0].pairs())) == 2
