"""Codes of all conventions are read as those of one table, and what is read as another code is said."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
from support import PROJECT
from support.language_codes import M2M, MBART_50, NLLB, write_recipe
from support.small_corpora import recipe as small_recipe

from lsmoe_ds import notices
from lsmoe_ds.config.codes import asked_direction, read_code, read_direction, read_directions
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.data.cleaning import PairFilter
from lsmoe_ds.directions import Direction, english_centric, task_language, task_order
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.groups import membership
from lsmoe_ds.export.their_vocabulary import M2M_100_LANGUAGES
from lsmoe_ds.languages import family, is_known, language_name, normalize_code, script


@pytest.fixture(autouse=True)
def nothing_said_yet():
    notices.notice.cache_clear()


NTREX = """
afr amh arb aze-Latn bak bel bem ben bod bos bul cat ces ckb-Arab cym dan deu div dzo ell eng est eus ewe fao fas fij fil fin
fra fra-CA fuc gle glg guj hau heb hin hmn hrv hun hye ibo ind isl ita jpn kan kat kaz khm kin kir kmr kor lao lav lit ltz mal mar
mey mkd mlg mlt mon mri msa mya nde nep nld nno nob nso nya orm pan pol por por-BR prs pus ron rus shi sin slk slv smo sna-Latn snd-Arab
som spa spa-MX sqi srp-Cyrl srp-Latn ssw swa swe tah tam tat tel tgk-Cyrl tha tir ton tsn tuk tur uig ukr urd uzb ven vie wol xho yor
yue zho-CN zho-TW zul
"""


def test_every_code_of_flores_200_is_a_language_of_its_own_in_its_script():
    assert len(NLLB) == 202  # FLORES-200 has these, but for two that NLLB's tokenizer lacks
    flores = [*(code for code in NLLB if code != "sat_Beng"), "sat_Olck", "arb_Latn", "min_Arab"]
    ours = [normalize_code(code) for code in flores]
    assert len(set(ours)) == len(flores)
    written = {"Hang": "Kore"}
    assert [(code, script(code)) for code in ours] == [
        (a, written.get(b[4:], b[4:])) for a, b in zip(ours, flores, strict=True)
    ]
    assert all(is_known(code) and language_name(code) != code and family(code) != "Unknown" for code in ours)
    assert normalize_code("sat_Beng") == "sat"  # as NLLB calls Santali, whose text is in Ol Chiki


@pytest.mark.parametrize(
    ("codes", "count"), [(M2M, 100), (M2M_100_LANGUAGES.split(), 100), (MBART_50, 52), (NTREX.split(), 125)]
)
def test_every_code_of_other_systems_is_a_language_of_its_own(codes: list[str], count: int):
    assert len({normalize_code(code) for code in codes}) == len(codes) == count
    assert [code for code in codes if not is_known(code)] == []


# What a speaker of the convention would say: BCP 47 (RFC 5646), ISO 639-2 and -3, the papers of FLORES-200
# and M2M-100.
READ = """
de: deu ger deu_Latn de-DE de_DE.UTF-8 DE DEU_LATN de_Latn_DE __de__
en: eng eng_Latn en-US en_GB EN en_XX eng-GB en-Latn-AU
zh_Hans: zh zho chi cmn zho_Hans zh-CN zh_CN zh-Hans zh-Hans-CN ZH-cn zh_SG zho-CN cmn_Hans
zh_Hant: zho_Hant zh-TW zh_TW zh-Hant zh-Hant-TW zho-TW cmn_Hant
zh_HK: zh-HK zh-Hant-HK
yue: yue_Hant zh-yue yue-HK
ja: jpn jpn_Jpan ja-JP
ko: kor kor_Hang ko-KR ko_Kore
th: tha tha_Thai th_TH
pt: por por_Latn pt-PT pt_XX
pt_BR: pt-BR por-BR pt-br pt-Latn-BR
sr: srp srp_Cyrl srp-Cyrl sr_RS sr@cyrillic
sr_Latn: srp_Latn srp-Latn sr@latin sr-el sr_ME
es: spa spa_Latn es-ES es_XX
es_419: es-419 spa-419
es_MX: es-MX spa-MX
he: iw heb heb_Hebr iw_IL he-IL
id: in ind ind_Latn in_ID
yi: ji yid ydd_Hebr
ro: mo ron rum ron_Latn
nb: nob nob_Latn nb-NO
no: nor no_NO
fa: fas per pes_Arab fa_IR
ar: ara arb arb_Arab ar-EG ar_AR
nso: ns nso_Latn
kk_Arab: kk-CN kaz_Arab
uz_Arab: uz_AF uzb-Arab
be_tarask: be-tarask be-x-old be@tarask
"""


@pytest.mark.parametrize("line", READ.strip().splitlines())
def test_codes_of_all_conventions(line: str):
    ours, others = line.split(": ")
    assert {other: normalize_code(other) for other in [ours, *others.split()]} == dict.fromkeys(
        [ours, *others.split()], ours
    )


def test_what_hangs_on_a_code_is_right_by_any_of_its_names():
    for code in ("zho_Hans", "zh", "zh_CN", "cmn"):
        assert (script(code), language_name(code), family(code)) == (
            "Hans",
            "Chinese (Simplified)",
            "Sino-Tibetan, Sinitic",
        )
    for code, tokenizer in (("zho_Hans", "zh"), ("zh-TW", "zh"), ("tha_Thai", "char"), ("deu_Latn", "13a")):
        assert (
            f"tok:{tokenizer}|"
            in score_direction(Direction("en", read_code(code)), ["a"], ["b"], ["b"]).signatures["bleu"]
        )
    assert (language_name("es-419"), language_name("uz_AF"), script("uz_AF")) == (
        "Spanish (419)",
        "Uzbek (Arab)",
        "Arab",
    )
    assert (
        PairFilter(small_recipe(Path(".")).data.cleaning, "en", "jpn_Jpan").rule_against(
            "Save all the changes", "Alles sichern"
        )
        == "script"
    )
    assert english_centric(["eng_Latn", "de"]) == [Direction("en", "de"), Direction("de", "en")]
    assert task_language("eng_Latn-de") == "de"
    assert membership(Direction("de", "eng_Latn"), {}) == ("into_english", "all")


def test_the_order_of_tasks_is_that_of_models_that_are_trained():
    """By the table before aliases were resolved: static routing and groups of experts follow this order."""
    rows = [
        line.split("\t")
        for line in (PROJECT / "tools/languages.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    others = (
        "no zh zho_Hans eng_Latn deu_Latn jpn_Jpan xx qaa hil brx ns iw en_GB es_MX zh_CN zh_TW por_Latn "
        "de_AT uz_Arab kk_CN x_a"
    )
    codes = [*(row[0] for row in rows if row[3]), *others.split()]
    assert (
        hashlib.sha256(",".join(sorted(codes, key=task_order)).encode()).hexdigest()[:16]
        == "4c3066d706df1a09"
    )
    assert sorted(["eng_Latn-de", "en-ru", "en-de", "sv-en"], key=task_order) == [
        "en-de",
        "sv-en",
        "en-ru",
        "eng_Latn-de",
    ]


def test_table_and_page_are_those_of_the_libraries():
    spec = importlib.util.spec_from_file_location("make_languages", PROJECT / "tools" / "make_languages.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TABLE.read_text(encoding="utf-8") == tool.render_table(tool.make_table()), (
        "run python tools/make_languages.py"
    )
    assert tool.PAGE.read_text(encoding="utf-8") == tool.render_page(tool.read_table()), (
        "run python tools/make_languages.py"
    )


# What a person writes.


def test_what_is_read_as_another_code_is_said_once(capsys):
    assert [read_code(code) for code in ("deu_Latn", "deu_Latn", "de", " zh-CN ")] == [
        "de",
        "de",
        "de",
        "zh_Hans",
    ]
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "lsmoe: language 'deu_Latn' is read as 'de' (German)",
        "lsmoe: language 'zh-CN' is read as 'zh_Hans' (Chinese (Simplified))",
    ]
    assert said.out == ""


def test_all_codes_of_one_place_are_said_in_one_line(tmp_path, capsys):
    asked_direction("eng", "fas_AF")
    assert (
        capsys.readouterr().err
        == "lsmoe: language 'eng' is read as 'en' (English), 'fas_AF' as 'prs' (Dari)\n"
    )
    read_directions(["eng_Latn-deu_Latn", "eng_Latn-xx", "qaa-deu_Latn", ""])
    assert (
        capsys.readouterr().err
        == "lsmoe: language 'eng_Latn' is read as 'en' (English), 'deu_Latn' as 'de' (German); languages "
        "'xx', 'qaa' are not in the table (docs/languages.md): no name, no script filter, BLEU by 13a\n"
    )
    load_recipe(write_recipe(tmp_path, dict.fromkeys(["en", *NLLB[:30]], 2), languages=NLLB[:30]))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(" and 20 more") and len(said) < 400


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_of_many_ranks_one_says_it(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "1")
    assert read_code("eng") == "en" and capsys.readouterr().err == ""
    notices.notice.cache_clear()
    monkeypatch.setenv(variable, "0")
    assert read_code("eng") == "en" and "'eng' is read as 'en'" in capsys.readouterr().err


def test_unknown_codes_are_accepted_and_said(capsys):
    assert [read_code(code) for code in ("xx", "qaa", "x-mine")] == ["xx", "qaa", "x_mine"]
    said = capsys.readouterr().err
    assert (
        said.count("is not in the table") == 3
        and "'xx' is not in the table (docs/languages.md): no name, no script filter" in said
    )
    assert read_code("qtz", of_system=True) == "qtz" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("germn", "'germn' is not a language code (did you mean 'de', German?)"),
        ("German", "'German' is not a language code (did you mean 'de', German?)"),
        ("english", "(did you mean 'en', English?)"),
        ("Deutsch", "(did you mean 'de', German?)"),
        ("Français", "(did you mean 'fr', French?)"),
        ("русский", "(did you mean 'ru', Russian?)"),
        ("Chinese", "(did you mean 'zh_Hans', Chinese (Simplified)?)"),
        ("Dutch", "(did you mean 'nl', Dutch?)"),
        ("dari", "(did you mean 'prs', Dari?)"),
        ("d", "'d' is not a language code: write an ISO 639 code such as de"),
        ("", "'' is not a language code"),
        ("de/", "'de/' is not a language code"),
        ("x", "'x' is not a language code"),
        ("../de", "'../de' is not a language code"),
    ],
)
def test_what_is_no_code_is_refused_with_the_nearest(text: str, says: str):
    with pytest.raises(UserError) as error:
        read_code(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("en-de", "en-de"), ("eng_Latn-deu_Latn", "en-de"), ("zh-CN-en", "zh_Hans-en"), ("en-zh-CN", "en-zh_Hans"),
        ("pt-BR-en", "pt_BR-en"),
        ("en-zh-Hant-TW", "en-zh_Hant"), ("en-US-fr-CA", "en-fr_CA"), ("en-es-419", "en-es_419"), ("sr-Latn-sr-Cyrl", "sr_Latn-sr"),
        ("en_XX-ro_RO", "en-ro"), ("EN-DE", "en-de"), ("zh_Hans-zh_Hant", "zh_Hans-zh_Hant"),
    ],
)  # fmt: skip
def test_directions_as_people_write_them(text: str, ours: str):
    assert str(read_direction(text)) == ours


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "zh-cn-en",
            (
                "'zh-cn-en' is not a direction: write source-target with two different codes, such as en-de; "
                "the parts of a code are"
            ),
        ),
        ("en", "'en' is not a direction"),
        ("en-", "'en-' is not a direction"),
        ("en>de", "'en>de' is not a direction"),
        ("en-eng_Latn", "'en-eng_Latn' is not a direction: both codes are en (English)"),
        ("zh-zho_Hans", "both codes are zh_Hans"),
        ("en-german", "'german' is not a language code (did you mean 'de', German?)"),
    ],
)
def test_what_is_no_direction_is_refused(text: str, says: str):
    with pytest.raises(UserError) as error:
        read_direction(text)
    assert says in str(error.value)
