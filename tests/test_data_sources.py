import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from small_corpora import recipe

from lsmoe_ds.data import archives, sources
from lsmoe_ds.data.catalogues import without_tags
from lsmoe_ds.data.documents import align_sentences
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.sources import SOURCES, Source, corpus_damage, fetch
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError


def catalogue(entries: dict[str, str]) -> bytes:
    """A compiled gettext catalogue."""
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
        UserError, match=r"corpus django could not be fetched through pip: .*No matching distribution"
    ) as error:
        fetch(["django"], tmp_path)
    assert "\n" not in str(error.value)


def offer_packages(
    monkeypatch: pytest.MonkeyPatch, folder: Path, packages: dict[str, dict[str, str | bytes]]
) -> list[Path]:
    """Lets apt bring packages of version 1:2.3 that hold these files below usr/share, and their copyright."""
    debs = []
    for name, files in packages.items():
        root = folder / "roots" / name
        control = f"Package: {name}\nVersion: 1:2.3\nArchitecture: all\nMaintainer: N <n@n>\nDescription: d\n"
        whole: dict[str, str | bytes] = {"DEBIAN/control": control, f"usr/share/doc/{name}/copyright": "GPL"}
        for path, content in (
            whole | {f"usr/share/{path}": content for path, content in files.items()}
        ).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
        debs.append(folder / f"{name}_1%3a2.3_all.deb")
        command = ["dpkg-deb", "--build", "--root-owner-group", "-Znone", root, debs[-1]]
        subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(shutil, "which", lambda name: name)

    def call(command: list[str], folder: Path, failure: str) -> None:
        assert command[1] == "download" and set(packages) <= set(command)
        for deb in reversed(debs):
            shutil.copy(deb, folder)

    monkeypatch.setattr(sources, "_call", call)
    return debs


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


@needs_dpkg
@pytest.mark.parametrize(
    "what", ["above", "absolute", "symbolic link", "hard link", "device", "huge", "unpacks to too much"]
)
def test_a_hostile_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Nothing is written under the names of an archive, only regular files are read, and within limits."""
    path = "usr/share/mediawiki/languages/i18n"
    (deb,) = offer_packages(
        monkeypatch, tmp_path, {"mediawiki": {f"{path[10:]}/en.json": '{"save": "Save it"}'}}
    )
    secret = tmp_path / "secret.json"
    secret.write_text('{"save": "geheim"}')
    member = tarfile.TarInfo(
        {"above": f"../../{path}/de.json", "absolute": f"/{path}/de.json"}.get(what, f"./{path}/de.json")
    )
    content = b'{"save": "Sichern"}'
    if what in ("symbolic link", "hard link"):
        member.type, member.linkname, content = (
            tarfile.SYMTYPE if what[0] == "s" else tarfile.LNKTYPE,
            str(secret),
            b"",
        )
    elif what == "device":
        member.type, member.devmajor, member.devminor, content = tarfile.CHRTYPE, 1, 5, b""
    member.size = 2**40 if what == "huge" else len(content)
    if what == "unpacks to too much":
        monkeypatch.setattr(archives, "ARCHIVE_LIMIT", 1000)
    add_member(deb, member, content)
    before = {each for each in tmp_path.rglob("*") if "corpora" not in each.parts}
    with pytest.raises(UserError, match=r"damaged|more than is reasonable|no translations"):
        fetch(["mediawiki"], tmp_path)
    assert {each for each in tmp_path.rglob("*") if "corpora" not in each.parts} == before
    assert [each.name for each in (tmp_path / "corpora").iterdir()] == []


def add_member(deb: Path, member: tarfile.TarInfo, content: bytes) -> None:
    """Puts a member at the end of the tar in a package (made with -Znone), as ar and tar store it."""
    whole = deb.read_bytes()
    start = whole.index(b"data.tar")
    size = int(whole[start + 48 : start + 58])
    data = whole[start + 60 : start + 60 + size].rstrip(b"\0")
    data += bytes(-len(data) % 512) + member.tobuf() + content + bytes(-len(content) % 512) + bytes(10240)
    header = whole[start : start + 48] + f"{len(data):<10}".encode() + b"`\n"
    deb.write_bytes(whole[:start] + header + data)


@needs_dpkg
def test_mediawiki_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = {
        "en": {
            "@metadata": {},
            "save": "Save the '''page'''",
            "only": "Only here",
            "see": "See [[Help|the help]]",
        },
        "zh-hans": {"save": "保存页面"},
        "be-tarask": {"save": "Захаваць", "see": "Глядзі [[Help|дапамогу]]", "unknown": "x"},
        "qqq": {"save": "a note"},
        "de-formal": {"save": "Sichern Sie"},
        "en-gb": {"save": "Save"},
    }
    files: dict[str, str | bytes] = {
        f"mediawiki/languages/i18n/{name}.json": json.dumps(content) for name, content in messages.items()
    }
    (deb,) = offer_packages(monkeypatch, tmp_path, {"mediawiki": files})
    (folder,) = fetch(["mediawiki"], tmp_path)
    assert sorted(path.name for path in folder.glob("*.tsv")) == ["be_tarask-en.tsv", "en-zh_Hans.tsv"]
    assert (folder / "en-zh_Hans.tsv").read_text() == "Save the page\t保存页面\n"
    assert (
        folder / "be_tarask-en.tsv"
    ).read_text() == "Захаваць\tSave the page\nГлядзі дапамогу\tSee the help\n"
    assert json.loads((folder / "PROVENANCE.json").read_text())["version"] == "1:2.3"
    deb.write_bytes(deb.read_bytes()[:300])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="damaged"):
        fetch(["mediawiki"], tmp_path)


@needs_dpkg
def test_the_catalogues_of_the_game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = {
        "race+female^Elf": "Elfe",
        "Halt! Who is it\n\nSpeak. <i>Now</i>.": "Halt! Wer ist da\nSprecht. <i>Jetzt</i>.",
        "One. Two.": "Beide zusammen.",
        "See <ref>dst='a_b' text='the elf\\'s help'</ref><img>src='x.png'</img>.": (
            "Siehe <ref>text='die Hilfe' dst='a_b'</ref>."
        ),
        "prefix=Al,Bo,Ca,De,Eo": "prefix=Al,Bo,Ca,De,Eu",
    }
    packages: dict[str, dict[str, str | bytes]] = {name: {} for name in SOURCES["wesnoth"].packages}
    packages["wesnoth-1.16-dm"] = {
        "games/wesnoth/1.16/locale/de/LC_MESSAGES/wesnoth-dm.mo": catalogue(campaign)
    }
    packages["wesnoth-1.16-data"] = {
        "games/wesnoth/1.16/locale/de/LC_MESSAGES/wesnoth.mo": catalogue({"Axe": "Axt"}),
        "games/wesnoth/1.16/locale/en@shaw/LC_MESSAGES/wesnoth.mo": catalogue({"Axe": "x"}),
    }
    offer_packages(monkeypatch, tmp_path, packages)
    (folder,) = fetch(["wesnoth"], tmp_path)
    assert (folder / "LICENSE").read_text() == "GPL"
    assert [path.name for path in folder.glob("*.tsv")] == ["de-en.tsv"]
    lines = (folder / "de-en.tsv").read_text().splitlines()
    assert lines[0] == "Axt\tAxe"
    assert sorted(lines[1:]) == [
        "Beide zusammen.\tOne. Two.", "Elfe\tElf", "Halt!\tHalt!", "Jetzt.\tNow.", "Siehe die Hilfe.\tSee the elf's help.",
        "Sprecht.\tSpeak.", "Wer ist da\tWho is it",
    ]  # fmt: skip
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert len(provenance["archives"]) == len(packages) and provenance["version"] == "1:2.3"


def mallard(title: str, *paragraphs: str) -> str:
    return f"""<!DOCTYPE page [<!ENTITY file SYSTEM "/etc/passwd">]>
<page xmlns="http://projectmallard.org/1.0/"><info><credit><name>N</name><p>by me</p></credit></info>
<title>{title}</title>{"".join(f"<p>{text}</p>" for text in paragraphs)}</page>"""


@needs_dpkg
def test_help_is_aligned_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "<keyseq><key>{}</key><key>C</key></keyseq> &file;"
    files: dict[str, str | bytes] = {
        "help/C/desk/a.page": mallard("Mouse", "Press <key>Esc</key>.<!-- no --> It\n works.", keys.format("Ctrl")),
        "help/de/desk/a.page": mallard("Maus", "Drücke <key>Esc</key>. Es geht.", keys.format("Strg")),
        "help/fr/desk/a.page": mallard("Souris", "Appuyez."),
        "help/it/desk/a.page": mallard("Mouse", "Premi A.", "<b>unclosed"),
        "help/es/desk/other.page": mallard("Otro"),
    }  # fmt: skip
    offer_packages(monkeypatch, tmp_path, {"gnome-user-docs": files})
    (folder,) = fetch(["gnome-user-docs"], tmp_path)
    assert [path.name for path in folder.glob("*.tsv")] == ["de-en.tsv"]
    assert (folder / "de-en.tsv").read_text().splitlines() == [
        "Maus\tMouse", "Drücke Esc.\tPress Esc.", "Es geht.\tIt works.", "Strg+C &file;\tCtrl+C &file;",
    ]  # fmt: skip
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert (provenance["documents"], provenance["documents_left_out"]) == (1, 2)


def page(title: str, text: str, last: str = "Same") -> str:
    return f"""<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>x</title></head><body>
<ul class="docnav"><li>Next</li></ul>
<h2 class="title">6.2. {title}</h2><div class="para">{text}
<ul><li><div class="para">{last}</div></li></ul>
</div><p>{text} → <a>https://example.org/x</a></p><pre>code</pre></body></html>"""


@needs_dpkg
def test_handbook_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "doc/debian-handbook/html"
    files: dict[str, str | bytes] = {
        f"{place}/en-US/apt.html": page("Tools", "Some<br/>text"),
        f"{place}/ja-JP/apt.html": page("道具", "本文"),
        f"{place}/de-DE/apt.html": page("Werkzeuge", "Ein Text").replace("</pre>", "</pre><p>Mehr</p>"),
    }
    offer_packages(monkeypatch, tmp_path, {"debian-handbook": files})
    (folder,) = fetch(["debian-handbook"], tmp_path)
    assert [path.name for path in folder.glob("*.tsv")] == ["en-ja.tsv"]
    assert (folder / "en-ja.tsv").read_text() == "Tools\t道具\nSome text\t本文\n"
    assert json.loads((folder / "PROVENANCE.json").read_text())["documents_left_out"] == 1


@needs_dpkg
def test_help_in_a_package_for_each_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "<html><body><header><p>Top</p></header><p>{}<span class='x'><span "
        "class='MAC'>Cmd</span><span>{}</span></span></p></body></html>"
    )
    packages: dict[str, dict[str, str | bytes]] = {name: {} for name in SOURCES["libreoffice-help"].packages}
    for code, words in {
        "en-US": ("Press ", "Ctrl"),
        "ca": ("Premeu ", "Ctrl"),
        "pt-BR": ("Tecle ", "Ctrl"),
    }.items():
        packages[f"libreoffice-help-{code.lower()}"] = {
            f"libreoffice/help/{code}/text/shared/a.html": text.format(*words)
        }
    offer_packages(monkeypatch, tmp_path, packages)
    (folder,) = fetch(["libreoffice-help"], tmp_path)
    assert {path.name: path.read_text() for path in folder.glob("*.tsv")} == {
        "ca-en.tsv": "Premeu Ctrl\tPress Ctrl\n", "en-pt_BR.tsv": "Press Ctrl\tTecle Ctrl\n",
    }  # fmt: skip


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
    assert 3 < tokens.source.lengths.mean() < 60


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
