"""Text as OPUS and translation tools give it: TMX, Moses files in a zip, and what zstd has packed."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
import zstandard
from support.small_corpora import found

from lsmoe_ds.data.lines import read_lines, readable
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

TMX = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en"><seg>Open the <bpt i="1">&lt;b&gt;</bpt>file<ept i="1">x</ept> &amp; read.</seg></tuv>
    <tuv xml:lang="de-DE"><seg>Öffne die <hi>Datei</hi> und lies.</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>Only English.</seg></tuv></tu>
<tu><tuv xml:lang="fr"><seg>Deux
lignes.</seg></tuv><tuv xml:lang="en"><seg>Two lines.</seg></tuv></tu>
</body></tmx>
"""


def write_tmx(path: Path, text: str = TMX) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_tmx(tmp_path, packed):
    path = write_tmx(tmp_path / "memory.tmx")
    if packed:
        pack = gzip.compress if packed == ".gz" else zstandard.compress
        (tmp_path / f"memory.tmx{packed}").write_bytes(pack(path.read_bytes()))
        path.unlink()
    (german,) = found(path, "tmx", "de-en")
    assert list(german.pairs()) == [("Öffne die Datei und lies.", "Open the file & read.")]
    (french,) = found(path, "tmx", "en-fr")
    assert list(french.pairs()) == [("Two lines.", "Deux\nlignes.")]
    assert found(path, "tmx", "de-fr") and not list(found(path, "tmx", "de-fr")[0].pairs())
    assert found(path, "tmx", "en-nl") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TMX[:-30], "memory.tmx is no well-formed XML: "),
        ("no XML", "memory.tmx is no well-formed XML: "),
        (TMX.replace("<tu>", "<xu>").replace("</tu>", "</xu>"), "is no TMX with two languages"),
    ],
)
def test_what_is_no_tmx_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        found(write_tmx(tmp_path / "memory.tmx", text), "tmx", "de-en")


def test_tmx_reads_nothing_outside_the_file(tmp_path):
    (tmp_path / "secret").write_text("secret text")
    entity = f'<!DOCTYPE tmx [<!ENTITY out SYSTEM "file://{tmp_path}/secret">]>'
    text = (
        TMX.replace('<!DOCTYPE tmx SYSTEM "tmx14.dtd">', entity)
        .replace("Only", "&out;")
        .replace("Two lines", "&out; lines")
    )
    (part,) = found(write_tmx(tmp_path / "memory.tmx", text), "tmx", "en-fr")
    assert [first for first, _ in part.pairs()] == [" lines."]


def write_zip(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_moses_files_in_a_zip(tmp_path):
    path = write_zip(
        tmp_path / "de-en.txt.zip",
        **{
            "README": "Read me",
            "LICENSE": "x",
            "Books.de-en.de": "Eins\nZwei\n",
            "Books.de-en.en": "One\nTwo\n",
        },
    )
    (part,) = found(path, "moses", "de-en")
    assert (part.split, list(part.pairs())) == ("train", [("Eins", "One"), ("Zwei", "Two")])
    short = write_zip(tmp_path / "s.zip", **{"a.de": "Eins\n", "a.en": "One\nTwo\n"})
    with pytest.raises(UserError, match=r"s.zip/a.de has 1 line but .*s.zip/a.en has 2"):
        list(found(short, "moses", "de-en")[0].pairs())
    with pytest.raises(UserError, match="has no two aligned files in it"):
        found(write_zip(tmp_path / "r.zip", README="x"), "moses", "de-en")
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cut.zip is damaged or no zip"):
        found(tmp_path / "cut.zip", "moses", "de-en")


def test_zstd(tmp_path):
    lines = [f"line {i} " + "x" * (i % 977) for i in range(20_000)]
    half = (
        "".join(f"{line}\n" for line in lines[:7]).encode(),
        "".join(f"{line}\n" for line in lines[7:]).encode(),
    )
    packed = b"".join(map(zstandard.compress, half))  # two frames, as pzstd and cat leave them
    (tmp_path / "a.de.zst").write_bytes(packed)
    assert list(read_lines(tmp_path / "a.de.zst")) == lines
    (tmp_path / "named").write_bytes(packed)
    assert list(read_lines(tmp_path / "named")) == lines, "its first bytes tell"
    (tmp_path / "a.de.zst").write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"a.de.zst is damaged: zstd cannot read it \(the file ends within"):
        list(read_lines(tmp_path / "a.de.zst"))
    (tmp_path / "a.de.zst").write_bytes(b"no zstd at all")
    with pytest.raises(UserError, match=r"a.de.zst is damaged: zstd cannot read it"):
        list(read_lines(tmp_path / "a.de.zst"))


def test_one_of_a_file_that_is_there_plain_and_packed(tmp_path):
    for name in ("a.de", "a.de.gz", "a.de.zst", "b.de.gz", "b.de.zst", "c.de.zst"):
        (tmp_path / name).touch()
    assert [path.name for path in readable(tmp_path.iterdir())] == ["a.de", "b.de.zst", "c.de.zst"]


def test_all_of_it_becomes_the_same_prepared_data(tmp_path, monkeypatch):
    """The same pairs as a table, packed by zstd, as TMX and in a zip give the same training text."""
    from support.small_run import make_recipe

    monkeypatch.chdir(tmp_path)
    pairs = [(f"the {i} small house number {i}", f"das {i} kleine Haus Nummer {i}") for i in range(400)]
    pairs = [
        tuple(text.translate(str.maketrans("0123456789", "abcdefghij")) for text in pair) for pair in pairs
    ]
    (tmp_path / "t.tsv.zst").write_bytes(
        zstandard.compress("".join(f"{a}\t{b}\n" for a, b in [("en", "de"), *pairs]).encode())
    )
    body = "".join(
        f'<tu><tuv xml:lang="en"><seg>{a}</seg></tuv><tuv xml:lang="de"><seg>{b}</seg></tuv></tu>'
        for a, b in pairs
    )
    write_tmx(tmp_path / "t.tmx", f"<tmx><body>{body}</body></tmx>")
    sides = {
        f"t.{code}": "".join(f"{pair[side]}\n" for pair in pairs) for side, code in enumerate(("en", "de"))
    }
    write_zip(tmp_path / "t.zip", **sides)
    contents = []
    for name, format in (("t.tsv", "tsv"), ("t.tmx", "tmx"), ("t.zip", "moses")):
        value = make_recipe(tmp_path, None, None).model_dump(mode="json", exclude_none=True)
        corpora = [{"path": name, "format": format}]
        value["data"] |= {"corpora": corpora, "directory": f"data-{format}", "directions": ["en-de", "de-en"]}
        value["data"].pop("languages")
        value["data"]["vocabulary"]["size"] = 72
        data = prepare(type(make_recipe(tmp_path, None, None)).model_validate(value))
        found_pairs = data.tokens(Direction("en", "de"), "train")
        contents.append([found_pairs.source[i].tolist() for i in range(len(found_pairs))])
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) > 300
