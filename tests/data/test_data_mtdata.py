"""Corpora of mtdata's index, fetched by a program that writes what mtdata 0.5.1 writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.small_corpora import pairs, recipe

from lsmoe_ds.data.mtdata import is_identifier
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.sources import corpus_damage, fetch
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

NAME = "Statmt-news_commentary-16-eng-deu"
PROGRAM = """#!{python}
import json, sys
from pathlib import Path

told = sys.argv[1:]
if told == ["--version"]:
    print("mtdata 0.5.1\\n/somewhere")
    sys.exit()
Path("{asked}").write_text(json.dumps(told))
out = Path(told[told.index("-o") + 1])
name = told[told.index("-tr") + 1]
if "news" not in name:
    print("Traceback ...\\nException: Could not find " + name, file=sys.stderr)
    sys.exit(1)
(out / "train-parts").mkdir()
for code in ("eng", "deu"):
    (out / "train-parts" / f"{{name}}.{{code}}").write_bytes(Path("{text}", code).read_bytes())
(out / "references.bib").write_text("%% " + name)
"""


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with the two sides that a stand-in for mtdata delivers.

    The stand-in writes its arguments to ``asked``.
    """
    folder, program = tmp_path / "text", tmp_path / "bin" / "mtdata"
    folder.mkdir()
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, asked=tmp_path / "asked", text=folder))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    sides = list(zip(*pairs("en", "de", 60), strict=True))
    for code, lines in zip(("eng", "deu"), sides, strict=True):
        (folder / code).write_text("".join(f" {line}\t \n" for line in lines))
    return folder


def test_an_identifier_is_a_corpus(text: Path, tmp_path: Path) -> None:
    (folder,) = fetch([NAME], tmp_path)
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked[1:6] == ["get", "-l", "eng-deu", "-tr", NAME]
    lines = (folder / "de-en.tsv").read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == pairs("de", "en", 60), "in the order of the name"
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert provenance["version"] == "0.5.1" and provenance["pairs"] == {"de-en": 60}
    assert (folder / "references.bib").read_text() == f"%% {NAME}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "PROVENANCE.json",
        "de-en.tsv",
        "references.bib",
    ]
    assert corpus_damage(NAME, tmp_path) is None
    (tmp_path / "asked").unlink()
    fetch([NAME], tmp_path)
    assert not (tmp_path / "asked").exists(), "what is there is not fetched again"
    prepared = prepare(recipe(tmp_path, corpora=[NAME], languages=["de"]))
    assert len(prepared.text(Direction("en", "de"), "test")[0]) > 0


def test_what_can_go_wrong(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"mtdata could not fetch OPUS-x-1-deu-eng: Exception: Could not find OPUS"
    ):
        fetch(["OPUS-x-1-deu-eng"], tmp_path)
    (text / "deu").write_text("Ein Satz\n")
    with pytest.raises(UserError, match=r"eng and .*deu of mtdata have not equally many lines"):
        fetch([NAME], tmp_path)
    with pytest.raises(UserError, match=f"run 'lsmoe data fetch {NAME}'"):
        prepare(recipe(tmp_path, corpora=[NAME], languages=["de"]))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"fetched by the program mtdata, which is not installed: pip install"
    ):
        fetch([NAME], tmp_path)
    assert list((tmp_path / "corpora").glob("*/*")) == []
    with pytest.raises(
        UserError, match=r"no corpus 'Statmt-news' to fetch.* and identifiers of mtdata such as"
    ):
        fetch(["Statmt-news"], tmp_path)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("OPUS-opensubtitles-v2018-deu-eng", True),
        ("ParaCrawl-paracrawl-9-eng-zho_Hans", True),
        ("Facebook-wikimatrix-1-por_BR-eng", True),
        ("Statmt-news_commentary-16-deu", False),
        ("debian-handbook", False),
        ("../x-1-deu-eng", False),
        ("A/b-c-1-deu-eng", False),
    ],
)
def test_identifiers_are_told_from_other_names(name: str, is_one: bool) -> None:
    assert is_identifier(name) is is_one
