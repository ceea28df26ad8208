import gzip
from pathlib import Path

import pytest
from support.small_corpora import found, pairs, texts, write_lines

from lsmoe_ds.data.formats import MissingCorpus, find_parts
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.errors import UserError


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


@pytest.mark.parametrize("names", ["deu.{}", "deu_Latn.{}", "{}.deu_Latn", "{}.deu_Latn.gz"])
def test_flores_of_every_year(tmp_path: Path, names: str) -> None:
    for folder, count in (("dev", 2), ("devtest", 3)):
        for code, name in (("de", names), ("en", names.replace("deu", "eng"))):
            path = tmp_path / folder / name.format(folder).removesuffix(".gz")
            write_lines(path, texts(code, count))
            if name.endswith(".gz"):
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    parts = found(tmp_path, "flores", "de-en", "en-fr")
    assert [(p.bitext, p.split, list(p.pairs())) for p in parts] == [
        ("de-en", "dev", pairs("de", "en", 2)),
        ("de-en", "test", pairs("de", "en", 3)),
    ]


def test_moses_and_tsv(tmp_path: Path) -> None:
    write_aligned(tmp_path / "news", "de", "en", 3)
    assert list(found(tmp_path / "news", "moses", "de-en", source="de", target="en")[0].pairs()) == pairs(
        "de", "en", 3
    )
    write_aligned(tmp_path / "sets/valid", "de", "en", 2)
    assert [p.split for p in found(tmp_path / "sets", "moses", "de-en")] == ["dev"]
    write_lines(tmp_path / "x.tsv", ["en\tfr\tde", "Hello\tBonjour\tHallo"])
    assert list(found(tmp_path / "x.tsv", "tsv", "de-en")[0].pairs()) == [("Hallo", "Hello")]
    assert list(found(tmp_path / "x.tsv", "tsv", "de-en", source="en", target="de")[0].pairs()) == [
        ("Hallo", "Hello")
    ]
    write_lines(tmp_path / "y.tsv", ["Hello\tHallo"])
    assert list(found(tmp_path / "y.tsv", "tsv", "de-en", source="en", target="de")[0].pairs()) == [
        ("Hallo", "Hello")
    ]


def test_txt_may_follow_the_code(tmp_path: Path) -> None:
    """Prefer a file without .txt to one with it. A name before .txt that is no language code belongs to the
    stem.
    """
    write_aligned(tmp_path / "train", "de", "en", 3)
    for code in ("de", "en"):
        (tmp_path / f"train.{code}").rename(tmp_path / f"train.{code}.txt")
        write_lines(tmp_path / f"notes.v2.{code}.txt", ["x"])
    write_lines(tmp_path / "read.me.first.txt", ["x"])
    write_compressed(tmp_path / "train.en.txt")
    for path in (tmp_path / "train", tmp_path):
        part = found(path, "moses", "de-en")[-1]
        assert list(part.pairs()) == pairs("de", "en", 3)
    write_aligned(tmp_path / "train", "de", "en", 2)
    assert len(list(found(tmp_path / "train", "moses", "de-en")[0].pairs())) == 2
    with pytest.raises(
        UserError,
        match=r"train.de.txt is a file itself: write 'path: .*/train', without the ending that names",
    ):
        found(tmp_path / "train.de.txt", "moses", "de-en")


@pytest.mark.parametrize("name", ["ok", "ok/", "ok.tsv", "sub/stem"])
def test_a_path_in_the_place_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("ok/a.de", "ok.tsv", "sub/stem.de"):
        write_lines(Path(file), ["x"])
    with pytest.raises(
        UserError,
        match=(
            rf"there is no corpus '{name}' to fetch: .*; for the text in {name} write {{path: {name},"
            r" format: F"
        ),
    ):
        find_parts([name], tmp_path, ["de-en"])
    for other in ("", "a\0/b", "x" * 5000, "[o]k"):
        with pytest.raises(UserError, match=r"such as Statmt-news_commentary-16-deu-eng$"):
            find_parts([other], tmp_path, ["de-en"])


def write_compressed(path: Path) -> None:
    """Replace a file with its compressed form, ``PATH.gz``."""
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def bad(tmp_path: Path, case: str) -> list[TextPart]:
    stem = tmp_path / "news"
    write_aligned(stem, "de", "en", 3)
    match case:
        case "shorter":
            write_lines(tmp_path / "news.en", texts("en", 2))
        case "one line":
            write_lines(tmp_path / "news.en", texts("en", 1))
        case "encoding":
            (tmp_path / "news.en").write_bytes(b"good\nbad \xff here\nmore\n")
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
        case "half an opus":
            write_aligned(tmp_path / "supervised/de-en/opus.de-en-test", "de", "en", 3)
            (tmp_path / "supervised/de-en/opus.de-en-test.en").unlink()
            return found(tmp_path, "opus100", "de-en")
        case "whole name":
            return found(tmp_path / "news.en", "moses", "de-en")
        case "whole name, compressed":
            write_compressed(tmp_path / "news.en")
            return found(tmp_path / "news.en.gz", "moses", "de-en")
        case "columns":
            write_lines(tmp_path / "x.tsv", ["one\ttwo", "only one"])
            return found(tmp_path / "x.tsv", "tsv", "de-en", source="de", target="en")
        case "header":
            write_lines(tmp_path / "x.tsv", ["no tab here"])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "half named":
            write_lines(tmp_path / "x.tsv", ["one\ttwo"])
            return found(tmp_path / "x.tsv", "tsv", "de-en", source="de")
        case "no header":
            write_lines(tmp_path / "x.tsv", ["Guten Morgen\tGood morning", "Ja\tYes"])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "header in quotes":
            write_lines(tmp_path / "x.tsv", ['"de"\t"en"', '"Ja"\t"Yes"'])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "further columns":
            write_lines(
                tmp_path / "x.tsv", ["0.9\tJa\tYes"]
            )  # a score that a miner of parallel text has written
            return found(tmp_path / "x.tsv", "tsv", "de-en", source="de", target="en")
        case "ragged":
            write_lines(tmp_path / "x.tsv", ["de\ten\tfr", "Ja\tYes\tOui", "Nein\tNo\tNon\tNo"])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "one code":
            write_lines(tmp_path / "x.tsv", ["de\tnotes", "Ja\tYes"])
            return found(tmp_path / "x.tsv", "tsv", "de-en")
        case "gzip cut":
            write_compressed(tmp_path / "news.en")
            cut = (tmp_path / "news.en.gz").read_bytes()
            (tmp_path / "news.en.gz").write_bytes(cut[: len(cut) - 12])
        case "no gzip":
            (tmp_path / "news.en").rename(tmp_path / "news.en.gz")
        case "gzip garbled":
            write_compressed(tmp_path / "news.en")
            spoiled = bytearray((tmp_path / "news.en.gz").read_bytes())
            spoiled[20:30] = b"\xff" * 10
            (tmp_path / "news.en.gz").write_bytes(spoiled)
        case "gzip not UTF-8":
            (tmp_path / "news.en").write_bytes(b"good\nbad \xff here\nmore\n")
            write_compressed(tmp_path / "news.en")
        case "not fetched":
            return find_parts(["django"], tmp_path, ["de-en"])
        case "unknown name":
            return find_parts(["djanga"], tmp_path, ["de-en"])
    return found(stem, "moses", "de-en", source="de", target="en")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("shorter", r"news.en has 2 lines but .*news.de has 3: aligned"),
        ("encoding", r"news.en, line 2: not UTF-8 \(byte 0xff at position 5\)"),
        ("one missing", r"there is no file .*news.en"),
        ("binary", r"news.en, line 1: the line is longer"),
        ("no folder", r"there is no corpus .*nowhere"),
        ("no opus", r"not laid out as OPUS-100"),
        ("no flores", r"not laid out as FLORES"),
        ("no iwslt", r"not laid out as IWSLT"),
        ("no moses", r"there are no files .*other.CODE"),
        ("half an opus", r"there is no file .*opus.de-en-test.en"),
        (
            "whole name",
            r"news.en is a file itself: write 'path: .*/news', without the ending that names its language$",
        ),
        ("whole name, compressed", r"news.en.gz is a file itself: write 'path: .*/news', without the ending"),
        ("one line", r"news.en has 1 line but .*news.de has 3"),
        ("columns", r"x.tsv, line 2: 2 columns between tabs were expected, .*; found 1"),
        (
            "further columns",
            r"x.tsv, line 1: 2 columns .*, as there is no first line of language codes; found 3",
        ),
        ("ragged", r"x.tsv, line 3: 3 columns between tabs were expected, as in line 1; found 4"),
        ("header", r"x.tsv, line 1: two or more language codes"),
        (
            "no header",
            (
                r"x.tsv, line 1 names no languages \(found 'Guten Morgen', 'Good morning'\): .*'source:' and"
                r" 'target:' in the"
            ),
        ),
        (
            "header in quotes",
            (
                r"x.tsv, line 1 names no languages .*: quote marks are text here: write the table without"
                r" quotes around"
            ),
        ),
        ("one code", r"x.tsv, line 1 names no languages \(found 'de', 'notes'\)"),
        ("gzip cut", r"news.en.gz is damaged: gzip cannot read it"),
        ("no gzip", r"news.en.gz is damaged: gzip cannot read it"),
        ("gzip garbled", r"news.en.gz is damaged: gzip cannot read it"),
        ("gzip not UTF-8", r"news.en.gz, line 2: not UTF-8 \(byte 0xff at position 5\)"),
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


def test_compressed_files_of_every_layout(tmp_path: Path) -> None:
    """Compressing all files changes nothing, whether the recipe names them or they are found by their
    stems.
    """
    write_aligned(tmp_path / "opus/supervised/de-en/opus.de-en-train", "de", "en", 4)
    for name, code in (("deu_Latn", "de"), ("eng_Latn", "en")):
        write_lines(tmp_path / f"flores/devtest/{name}.devtest", texts(code, 3))
        write_lines(tmp_path / f"iwslt/train.tags.de-en.{code}", texts(code, 5))
        write_lines(
            tmp_path / f"iwslt/IWSLT14.TED.tst2010.de-en.{code}.xml",
            [f"<seg id='1'>{text}</seg>" for text in texts(code, 2)],
        )
    write_aligned(tmp_path / "moses/train", "de", "en", 6)
    write_aligned(tmp_path / "moses/dev", "de", "en", 1)
    write_lines(tmp_path / "x.tsv", ["de\ten", *("\t".join(pair) for pair in pairs("de", "en", 7))])

    def read() -> list[tuple[str, str, list[tuple[str, str]]]]:
        places = {
            "opus": "opus100",
            "flores": "flores",
            "iwslt": "iwslt",
            "moses": "moses",
            "moses/train": "moses",
            "x.tsv": "tsv",
        }
        parts = [
            part for place, format in places.items() for part in found(tmp_path / place, format, "de-en")
        ]
        return [(part.reader, part.split, list(part.pairs())) for part in parts]

    plain = read()
    assert [len(content) for *_, content in plain] == [4, 3, 2, 5, 1, 6, 6, 7]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        write_compressed(path)
    assert sorted(read()) == sorted(plain)
    assert list(found(tmp_path / "x.tsv.gz", "tsv", "de-en")[0].pairs()) == pairs("de", "en", 7)
    (tmp_path / "x.tsv.gz").rename(tmp_path / "renamed.tsv")  # its content says what it is
    assert list(found(tmp_path / "renamed.tsv", "tsv", "de-en")[0].pairs()) == pairs("de", "en", 7)


def test_a_plain_file_comes_before_a_compressed_one(tmp_path: Path) -> None:
    for count, change in ((2, write_compressed), (3, lambda path: None)):
        write_aligned(tmp_path / "news", "de", "en", count)
        for code in ("de", "en"):
            change(tmp_path / f"news.{code}")
    assert len(list(found(tmp_path / "news", "moses", "de-en")[0].pairs())) == 3


def test_a_header_of_other_codes_and_other_columns(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.tsv", ["id\tdeu\tnotes\teng_Latn", "7\tHallo\tx\tHello"])
    (part,) = found(tmp_path / "x.tsv", "tsv", "de-en", "en-fr")
    assert list(part.pairs()) == [("Hallo", "Hello")]
    write_lines(tmp_path / "y.tsv", ["qaa\tqab", "Hallo\tHello"])  # codes that no table has, but the recipe
    assert list(found(tmp_path / "y.tsv", "tsv", "qaa-qab")[0].pairs()) == [("Hallo", "Hello")]


def test_a_relative_path_is_shown_with_where_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingCorpus, match=rf"there is no corpus x.tsv \({tmp_path}/x.tsv\)"):
        found(Path("x.tsv"), "tsv", "de-en")
    with pytest.raises(MissingCorpus, match=rf"there are no files a.CODE, such as a.en, in {tmp_path}"):
        found(Path("a"), "moses", "de-en")
