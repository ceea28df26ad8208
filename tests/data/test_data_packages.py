"""Corpora in Debian packages: messages, catalogues and translated documents."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from support.small_corpora import catalogue

from lsmoe_ds.data import archives, sources
from lsmoe_ds.data.sources import SOURCES, fetch
from lsmoe_ds.errors import UserError


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
    """Append a member to the tar in a package (made with -Znone), as ar and tar store it."""
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
