"""recipes/silver_names.py: messages with invented names, from a small package of MediaWiki's layout."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT

pytest.importorskip("faker")

MESSAGES = {
    "en": {
        "logentry-move-move": "$1 {{GENDER:$2|moved}} page $3 to $4",
        "logentry-create-create": "$1 {{GENDER:$2|created}} page $3",
        "welcomeuser": "Welcome, $1!",
        "tooltip-search": "Search {{SITENAME}}",
        "userlogin-joinproject": "Join {{SITENAME}}",
        "cannotdelete": 'The page "[[:$1]]" could not be deleted.\nIt may have already been deleted.',
        "listfiles-userdoesnotexist": 'User account "$1" is not registered.',
        "contributions-userdoesnotexist": 'User account "$1" is not registered.',
        "protect-title": 'Change protection settings for "$1"',
        "whatlinkshere-title": 'Pages that link to "$1"',
        "nextpage": "Next page ($1)",
        "prevpage": "Previous page ($1)",
        "returnto": "Return to $1.",
        "htmlform-title-not-exists": "$1 does not exist.",
        "htmlform-user-not-exists": "$1 does not exist.",
        "siteuser": "{{SITENAME}} user $1",
        "plain-one": "You do not have permission to edit this page.",
        "plain-two": "The password that you entered is too short.",
        "plain-three": "Please enter a valid email address here.",
        "with-markup": "This <b>page</b> has no text at all.",
        "with-number": "$1 has {{PLURAL:$2|one edit|$2 edits}}",
        "unknown": "The tag $1 does not exist.",
    },
    "fr": {
        "logentry-create-create": "$1 a {{GENDER:$2|créé|créée}} la page $3",
        "welcomeuser": "Bienvenue, $1 !",
        "tooltip-search": "Rechercher sur {{SITENAME}}",
        "listfiles-userdoesnotexist": "Le compte de $1 n’existe pas.",
        "protect-title": "Protection de « $1 »",
        "whatlinkshere-title": "Pages liées à « $1 »",
        "nextpage": "Pages d’$1",
        "returnto": "Return to $1.",
        "prevpage": "Page précédente ($1s)",
    },
    "ja": {
        "logentry-create-create": "$1がページ「$3」を作成しました",
        "welcomeuser": "ようこそ、$1さん!",
        "tooltip-search": "{{SITENAME}}内を検索",
        "protect-title": "「$1」の保護レベルを変更",
        "whatlinkshere-title": "「$1」へリンクしているページ",
        "nextpage": "次のページ ($1)",
        "returnto": "ページ「$1」に戻る。",
    },
}


@pytest.fixture(scope="module")
def silver():
    """Return the script as a module, with fewer names than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT / "recipes")
        module = importlib.import_module("silver_names")
        patch.setattr(module, "POOL", 400)
        yield module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    messages, notes = folder / "usr/share/mediawiki/languages/i18n", folder / "usr/share/doc/mediawiki"
    messages.mkdir(parents=True)
    notes.mkdir(parents=True)
    for code, texts in MESSAGES.items():
        (messages / f"{code}.json").write_text(json.dumps({"@metadata": {}} | texts))
    (notes / "copyright").write_text("License: GPL-2.0-or-later\n")
    return folder


@pytest.fixture(scope="module")
def corpus(silver, package, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "silver-names"
    silver.write_corpus(package, out, 1)
    return out


def sentences(path: Path) -> list[list[tuple[str, str]]]:
    """Return the (token, tag) pairs of each sentence."""
    text = path.read_text(encoding="utf-8")
    if not text:  # the small package has no message for each split of each language
        return []
    assert text.endswith("\n\n") and "\n\n\n" not in text
    return [
        [tuple(line.removeprefix(f"{path.parent.name}:").split("\t")) for line in block.split("\n")]
        for block in text.strip("\n").split("\n\n")
    ]


def spans(sentence: list[tuple[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the class and the tokens of each name."""
    found: list[tuple[str, list[str]]] = []
    for token, tag in sentence:
        if tag.startswith("B-"):
            found.append((tag[2:], [token]))
        elif tag.startswith("I-"):
            assert found[-1][0] == tag[2:]
            found[-1][1].append(token)
    return [(kind, tuple(tokens)) for kind, tokens in found]


def outside(sentence: list[tuple[str, str]]) -> str:
    """Return the words of a sentence, each name replaced by an underscore."""
    return " ".join("_" if tag[0] == "B" else token for token, tag in sentence if tag[0] != "I")


def test_layout(corpus):
    assert {path.name for path in corpus.iterdir() if path.is_dir()} == set(MESSAGES)
    tags = {"O", *(f"{place}-{kind}" for place in "BI" for kind in ("PER", "ORG", "LOC"))}
    for code in MESSAGES:
        for split in ("train", "dev", "test"):
            lines = (corpus / code / split).read_text(encoding="utf-8").splitlines()
            assert all(line == "" or line.startswith(f"{code}:") for line in lines)
            assert {line.split("\t")[1] for line in lines if line} <= tags
    assert "GPL-2.0-or-later" in (corpus / "LICENSE").read_text()
    assert "silver data: nobody annotated" in (corpus / "README.md").read_text()
    provenance = json.loads((corpus / "PROVENANCE.json").read_text())
    assert provenance["counts"]["en"]["train"]["sentences"] == len(sentences(corpus / "en" / "train"))


def test_spans_spell_names_and_the_rest_is_the_message(silver, corpus):
    for code in MESSAGES:
        names = silver.Names(code, 1)
        for split in ("train", "dev", "test"):
            known = {
                (kind, tuple(silver.words(name, names.language)))
                for kind in silver.CLASSES
                for name, _ in names.dealt[split, kind]
            }
            found = sentences(corpus / code / split)
            assert {span for sentence in found for span in spans(sentence)} <= known
    texts = {outside(s) for split in ("train", "dev", "test") for s in sentences(corpus / "en" / split)}
    assert texts == {
        "_ moved page _ to _",
        "_ created page _",
        "Welcome , _ !",
        "Search _",
        "Join _",
        'The page " _ " could not be deleted .',
        'User account " _ " is not registered .',
        'Change protection settings for " _ "',
        'Pages that link to " _ "',
        "Next page ( _ )",
        "Previous page ( _ )",
        "Return to _ .",
        "_ does not exist .",
        "_ user _",
        "You do not have permission to edit this page .",
        "The password that you entered is too short .",
        "Please enter a valid email address here .",
    }


def test_elisions_are_words_and_no_word_is_torn(corpus):
    texts = {outside(s) for split in ("train", "dev", "test") for s in sentences(corpus / "fr" / split)}
    assert "Pages d’ _" in texts and "Le compte de _ n’ existe pas ." in texts
    assert not any("précédente" in text or "Return" in text for text in texts)  # "$1s"; not translated
    assert {"_ a créé la page _", "_ a créée la page _"} <= texts  # genders are those of the persons


def test_classes_are_those_of_the_placeholders(corpus):
    for code, words in {"en": "_ created page _", "ja": "_ が ペ ー ジ 「 _ 」 を 作 成 し ま し た"}.items():
        found = [s for split in ("train", "dev", "test") for s in sentences(corpus / code / split)]
        kinds = [[kind for kind, _ in spans(sentence)] for sentence in found if outside(sentence) == words]
        assert kinds and all(first == "PER" for first, _ in kinds)
        assert len({second for _, second in kinds}) > 1


def test_splits_share_no_message_and_no_name(corpus):
    of_key = dict(line.split("\t") for line in (corpus / "messages.tsv").read_text().splitlines())
    assert of_key["listfiles-userdoesnotexist"] == of_key["contributions-userdoesnotexist"]
    assert of_key["htmlform-title-not-exists"] == of_key["htmlform-user-not-exists"]  # page, user
    assert set(of_key.values()) == {"train", "dev", "test"}
    for code in MESSAGES:
        seen = {split: sentences(corpus / code / split) for split in ("train", "dev", "test")}
        for what in (outside, spans):
            parts = [
                {item for s in found for item in (what(s) if what is spans else [what(s)])}
                for found in seen.values()
            ]
            assert all(parts) or code != "en"
            assert sum(map(len, parts)) == len(set().union(*parts))


def test_languages_without_spaces_are_cut_into_characters(silver, corpus):
    for sentence in sentences(corpus / "ja" / "train"):
        assert all(len(token) == 1 for token, _ in sentence)
    assert silver.words("ที่นี่ 1", silver.LANGUAGES["th"]) == ["ที่", "นี่", "1"]


def test_same_seed_same_corpus(silver, package, corpus, tmp_path):
    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}

    silver.write_corpus(package, tmp_path / "again", 1)
    assert read(tmp_path / "again") == read(corpus)
    silver.write_corpus(package, tmp_path / "other", 2)
    assert read(tmp_path / "other") != read(corpus)


def test_names_do_not_depend_on_the_order_of_sets():
    script = (
        "import sys; sys.path.insert(0, 'recipes'); import silver_names; silver_names.POOL = 300;"
        " names = silver_names.Names('it', 1); print(sorted(names.dealt.items()))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-B", "-c", script],
            cwd=PROJECT,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and "LOC" in told[0]


def test_words(silver):
    def words(text: str, code: str = "en") -> list[str]:
        return silver.words(text, silver.LANGUAGES[code])

    assert words("don't re-use, e.g. S.A.S.!") == ["don't", "re-use", ",", "e.g.", "S.A.S.", "!"]
    assert words("dell'Arte, l’eau d'", "it") == ["dell'", "Arte", ",", "l’", "eau", "d'"]
    assert words("van 't Riet", "nl") == ["van", "'t", "Riet"]


def test_the_table_has_known_kinds(silver):
    table = silver.read_table()
    assert len(table) > 200
    assert {kind for kinds in table.values() for kind in kinds.values()} == set(silver.KINDS)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("faker", "silver_names: silver_names needs the package faker: python -m pip install '.[names]'\n"),
        ("package", "silver_names: there is no Debian package or folder nowhere\n"),
        (
            "messages",
            "silver_names: no English messages of MediaWiki were found in empty (.../i18n/en.json)\n",
        ),
    ],
)
def test_what_is_missing_is_told_in_a_sentence(silver, tmp_path, monkeypatch, capsys, missing, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if missing == "faker":
        monkeypatch.setitem(sys.modules, "faker", None)
    folder = "nowhere" if missing == "package" else "empty"
    monkeypatch.setattr(sys, "argv", ["silver_names.py", "--package", folder])
    with pytest.raises(SystemExit) as leaving:
        silver.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err == sentence
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
