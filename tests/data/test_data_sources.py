import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_corpora import catalogue, recipe

from lsmoe_ds.data import archives, sources
from lsmoe_ds.data.catalogues import without_tags
from lsmoe_ds.data.documents import align_sentences
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.sources import SOURCES, Source, corpus_damage, fetch
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


WHOLE = {
    "x/locale/de/LC_MESSAGES/django.mo": catalogue(
        {
            "": "Content-Type: text/plain",
            "menu\x04Save <b>it</b>": "Sichere es",
            "one\0many": "ein\0viele",
            "All &amp; more": "Alles & mehr",
        }
    ),
    "x/locale/en_GB/LC_MESSAGES/django.mo": catalogue({"Color": "Colour"}),
    "x/locale/zh_Hans/LC_MESSAGES/djangojs.mo": catalogue({"Save": "保存"}),
    "../../evil/locale/fr/LC_MESSAGES/django.mo": catalogue({"Save": "Sauver"}),
    "x-1.dist-info/licenses/LICENSE": b"Do what you like.",
}


def offer(monkeypatch: pytest.MonkeyPatch, content: bytes, **changes: str) -> None:
    """Lets pip bring ``content`` as django."""
    known = replace(SOURCES["django"], version="1", sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(SOURCES, "django", replace(known, **changes))

    def call(command: list[str], folder: Path, failure: str) -> None:
        assert command[1:4] == ["-m", "pip", "download"]
        (folder / "django-1-py3-none-any.whl").write_bytes(content)

    monkeypatch.setattr(sources, "_call", call)


def test_fetch_writes_bitexts_license_and_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, wheel(WHOLE))
    (folder,) = fetch(["django"], tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "PROVENANCE.json",
        "de-en.tsv",
        "en-fr.tsv",
        "en-zh_Hans.tsv",
    ]
    assert (folder / "de-en.tsv").read_text() == "Alles & mehr\tAll & more\nSichere es\tSave it\n"
    assert (folder / "en-zh_Hans.tsv").read_text() == "Save\t保存\n"
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert (provenance["package"], provenance["version"], provenance["license"]) == (
        "django",
        "1",
        "BSD-3-Clause",
    )
    assert provenance["pairs"] == {"de-en": 2, "en-fr": 1, "en-zh_Hans": 1}
    assert {path.name for path in tmp_path.rglob("*")} == {
        "corpora",
        "django",
        *(p.name for p in folder.iterdir()),
    }
    capsys.readouterr()
    monkeypatch.setattr(sources, "_call", None)
    fetch(["django"], tmp_path)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["cut off", "without provenance", "file gone"])
def test_a_damaged_folder_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    offer(monkeypatch, wheel(WHOLE))
    (folder,) = fetch(["django"], tmp_path)
    if what == "cut off":
        (folder / "de-en.tsv").write_text("x")
    else:
        (folder / {"without provenance": "PROVENANCE.json", "file gone": "LICENSE"}[what]).unlink()
    assert corpus_damage("django", tmp_path) is not None
    fetch(["django"], tmp_path)
    assert "fetching django again" in capsys.readouterr().err
    assert corpus_damage("django", tmp_path) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no archive", "is damaged"),
        (wheel({"x/locale/de/LC_MESSAGES/django.mo": b"\xde\x12\x04\x95" + b"\xff" * 40}), "is damaged"),
        (wheel({name: data for name, data in WHOLE.items() if "LICENSE" not in name}), "no licence text"),
        (wheel({"x-1.dist-info/licenses/LICENSE": b"Do."}), "no translations"),
        (
            wheel({"x/locale/de/LC_MESSAGES/django.mo": bytes(archives.MEMBER_LIMIT + 1)}),
            "more than is reasonable",
        ),
    ],
)
def test_a_bad_archive_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str
) -> None:
    offer(monkeypatch, content)
    with pytest.raises(UserError, match=says):
        fetch(["django"], tmp_path)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == []


def test_another_file_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, wheel(WHOLE), sha256="0" * 64)
    with pytest.raises(UserError, match="not the file that is known"):
        fetch(["django"], tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no corpus 'djnago' to fetch \(did you mean 'django'\?\)"):
        fetch(["djnago"], tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get and dpkg-deb are not on this machine: use django, wagtail"):
        fetch(["mediawiki"], tmp_path)
    monkeypatch.setattr(sources.sys, "executable", "/no/python")
    with pytest.raises(UserError, match="there is no program /no/python"):
        fetch(["django"], tmp_path)


def test_a_failed_download_tells_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        SOURCES, "django", Source("django", ("lsmoe-no-such-package",), "none", 1, version="0.0.0.dev0")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"django could not be fetched through pip: .*No matching distribution"
    ) as error:
        fetch(["django"], tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("english", "translated", "expected"),
    [
        ("It is, e.g. Debian. Use it!", "Das ist z. B. Debian. Benutze es!", 2),
        ("He said “Go.” Then he left.", "他说：“走。”然后离开了。", 2),
        ("One. Two.", "一つ。二つ。", 2),
        (
            "Short. This one is a very long sentence with lots of words in it.",
            "Dies ist ein ganz langer Satz mit vielen Worten. Kurz.",
            1,
        ),
        ("One. Two.", "Eins und zwei.", 1),
    ],
)
def test_sentences_are_split_where_both_sides_have_as_many(
    english: str, translated: str, expected: int
) -> None:
    pairs = align_sentences(english, translated)
    assert len(pairs) == expected
    assert all(text == text.strip() and text for pair in pairs for text in pair)
    assert " ".join(first for first, _ in pairs) == english


@pytest.mark.slow
def test_django_for_real(tmp_path: Path) -> None:
    fetch(["django"], tmp_path)
    settings = recipe(
        tmp_path, languages=["de", "ru", "ja"], vocabulary={"size": 800}, held_out={"dev": 20, "test": 30}
    )
    data = prepare(settings)
    rows = {(row.direction, row.split): row for row in show(settings).rows}
    assert rows["en-de", "train"].pairs > 120 and rows["en-ja", "test"].pairs == 20
    assert all(row.unknown < 0.02 for row in show(settings).rows if row.split == "train")
    tokens = data.tokens(data.languages.directions[0], "train")
    assert 3 < tokens.source.lengths[:].mean() < 60


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("_File", "File"),
        ("E_xit", "Exit"),
        ("Datei (_F)", "Datei"),
        ("Save _As", "Save As"),
        ("a _b_c", "a b_c"),
        ("_ alone", "_ alone"),
    ],
)
def test_the_mark_of_a_menus_key_is_no_text(text, plain):
    assert without_tags(text, accelerator="_") == plain
    assert without_tags(text) == text  # other programs have no such mark
