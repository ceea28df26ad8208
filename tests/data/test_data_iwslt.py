"""IWSLT's files: training text between tags, and sets whose segments are paired by their ids."""

from pathlib import Path

import pytest
from support.small_corpora import found, pairs, sentence, texts, write_lines

from lsmoe_ds.errors import UserError


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
    train, *held = sorted(
        found(tmp_path, "iwslt", "de-en"), key=lambda part: part.split == "train", reverse=True
    )
    assert list(train.pairs()) == [("A title", "A title"), *pairs("de", "en", 2)]
    assert {part.split for part in held} == {"dev", "test"}
    assert next(iter(held[0].pairs())) == (f"{sentence('de', 0)} Q&A &big;", f"{sentence('en', 0)} Q&A &big;")


def write_set(folder: Path, code: str, lines: list[str]) -> None:
    write_lines(folder / f"IWSLT14.TED.dev2010.de-en.{code}.xml", lines)


def read_set(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Read a set and return its pairs and the messages about it."""
    told: list[str] = []
    (part,) = found(folder, "iwslt", "de-en")
    return list(part.pairs(told.append)), told


def test_segments_of_iwslt_are_paired_by_their_ids(tmp_path: Path) -> None:
    """One side lacks 2 of the first document, the other one 1 of the second: both have three."""
    for code, ids in (("de", ([1, 3], [1])), ("en", ([1, 2, 3], []))):
        lines = []
        for document, numbers in enumerate(ids, 7):
            lines += [
                f'<doc docid="{document}" genre="lectures">',
                *(f"<seg id='{n}'> {code} {document}.{n} </seg>" for n in numbers),
                "</doc>",
            ]
        write_set(tmp_path, code, lines)
    content, told = read_set(tmp_path)
    assert content == [("de 7.1", "en 7.1"), ("de 7.3", "en 7.3")]
    (said,) = told
    assert said.startswith("warning: 2 segments are left out, whose docid and id only one file has: ")
    assert said.endswith(
        "de.xml lacks 1 and " + str(tmp_path / "IWSLT14.TED.dev2010.de-en.en.xml") + " lacks 1"
    )


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (
            ['<seg id="1">over', "  two lines", "", "</seg>", '<seg id="2">next</seg>'],
            ["over two lines", "next"],
        ),
        (
            ['<seg id="1"> R&D & a < b &amp; c&#10;d </seg><seg id="2"></seg>', '<SEG id="3"/>'],
            ["R&D & a < b & c d", "", ""],
        ),
        (['<seg id="1">never closed', '<seg id="2">next</seg>'], ["never closed", "next"]),
        (["<seg>no</seg>", "<seg>ids</seg>"], ["no", "ids"]),
        (['<doc><seg id="1">first</seg></doc>', '<doc><seg id="1">second</seg></doc>'], ["first", "second"]),
    ],
)
def test_no_segment_of_iwslt_is_lost(tmp_path: Path, lines: list[str], texts: list[str]) -> None:
    for code in ("de", "en"):
        write_set(tmp_path, code, lines)
    assert read_set(tmp_path) == ([(text, text) for text in texts], [])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["<seg>1</seg>"],
            r"de-en.en.xml has 1 segment but .*de-en.de.xml has 2: aligned files need equally many segments",
        ),
        (
            ['<doc docid="x">', '<seg id="1">1</seg>'],
            r"de.xml has 2 segments and .*en.xml has 1 segment, but no segment's docid and id are in both",
        ),
        ([], r"de.xml has 2 segments and .*en.xml has 0 segments"),
    ],
)
def test_segments_of_iwslt_that_do_not_fit(tmp_path: Path, lines: list[str], says: str) -> None:
    write_set(tmp_path, "de", ['<seg id="1">1</seg>', '<seg id="2">2</seg>'])
    write_set(tmp_path, "en", lines)
    with pytest.raises(UserError, match=says):
        read_set(tmp_path)


def test_only_lines_about_a_talk_are_no_text(tmp_path: Path) -> None:
    about = [
        '<doc docid="1" genre="lectures">',
        "<url>u</url>",
        "<keywords>k</keywords>",
        "<speaker>s</speaker>",
        "<talkid>1</talkid>",
    ]
    after = ['<reviewer href="h">r</reviewer>', "<translator>t</translator>", "</doc>"]
    text = ["<p>in a paragraph</p>", "<i>Hm</i>, he said", "< 5 and more", "<documents>"]
    write_lines(
        tmp_path / "train.tags.de-en.de",
        [*about, "<title>T</title>", "<description>D</description>", *text, *after],
    )
    write_lines(tmp_path / "train.tags.de-en.en", [*about, "T", "D", *text])
    (part,) = found(tmp_path, "iwslt", "de-en")
    assert list(part.pairs()) == [(line, line) for line in ["T", "D", *text]]
    write_lines(tmp_path / "train.tags.de-en.en", [*about, *text[1:], *after])
    with pytest.raises(
        UserError,
        match=r"de-en.en has 3 text lines but .*de-en.de has 6: aligned files need equally many text lines",
    ):
        list(part.pairs())
