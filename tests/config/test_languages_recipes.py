"""Codes in recipes and in what depends on them are read as those of the table."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support.language_codes import write_recipe

from lsmoe_ds.config.codes import resolve_codes
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.parts import choose_directions
from lsmoe_ds.languages import normalize_code, table


def test_recipes_hold_the_codes_of_the_table(tmp_path, capsys):
    path = write_recipe(
        tmp_path, {"zho": 2, "eng_Latn": 1, "pt_BR": 3}, languages=["eng_Latn", "zho_Hans", "pt-br"]
    )
    recipe = load_recipe(path)
    assert recipe.data.languages == ["en", "zh_Hans", "pt_BR"]
    assert recipe.data.directions == ["en-zh_Hans", "zh_Hans-en", "en-pt_BR", "pt_BR-en"]
    assert recipe.model.low_rank is not None and recipe.model.low_rank.rank == {
        "zh_Hans": 2,
        "en": 1,
        "pt_BR": 3,
    }
    assert yaml.safe_load(recipe.to_yaml())["data"]["languages"] == ["en", "zh_Hans", "pt_BR"]
    said = capsys.readouterr().err
    assert (
        said == "lsmoe: language 'eng_Latn' is read as 'en' (English), 'zho_Hans' as 'zh_Hans' (Chinese "
        "(Simplified)), 'pt-br' as 'pt_BR' (Brazilian Portuguese), 'zho' as 'zh_Hans' (Chinese "
        "(Simplified))\n"
    )
    directed = load_recipe(write_recipe(tmp_path, directions=["eng_Latn-deu_Latn", "fr-en", "de-zh-TW"]))
    assert directed.data.directions == ["en-de", "fr-en", "de-zh_Hant"]
    changed = load_recipe(
        path,
        [
            "data.directions=[]",
            "data.languages=[jpn, eng]",
            "model.low_rank={rank: {ja: 1, eng: 2}, index: language}",
            "model.low_rank.prune={ratio: 0.5, epochs: 15, languages: [jpn]}",
        ],
    )
    assert changed.data.languages == ["ja", "en"]
    assert changed.model.low_rank.prune.languages == ["ja"]


def test_directions_that_a_method_names(capsys):
    """Both sides of ``neurons.like`` are directions in any codes."""

    def read(like):
        recipe = {"model": {"neurons": {"like": like}}}
        return resolve_codes(recipe), recipe["model"]["neurons"]["like"]

    like = {"sr@latin-eng": "de-en", "en-sr-Latn": "eng_Latn-de"}
    assert read(like) == (None, {"sr_Latn-en": "de-en", "en-sr_Latn": "en-de"})
    assert "'sr@latin' as 'sr_Latn'" in capsys.readouterr().err
    for value, says in (
        ({"en-de": "en"}, "'en' is not a direction"),
        ({"deu-en": "en-de", "de-en": "en-de"}, "'deu-en' and 'de-en' are one direction, de-en"),
    ):
        key, found = read(value)[0]
        assert key == "model.neurons.like" and says in found


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"languages": ["de", "deu"]},
            "'data.languages': 'de' and 'deu' are one language (German), de: write one of them",
        ),
        (
            {"languages": ["zh_Hans", "zho_Hans"]},
            "'zh_Hans' and 'zho_Hans' are one language (Chinese (Simplified)), zh_Hans",
        ),
        ({"languages": ["en_GB", "en_US", "de"]}, "'en_GB' and 'en_US' are one language (English), en"),
        (
            {"directions": ["en-de", "eng_Latn-deu_Latn"]},
            "'data.directions': 'en-de' and 'eng_Latn-deu_Latn' are one direction, en-de",
        ),
        (
            {"directions": ["de-deu"]},
            "'data.directions': 'de-deu' is not a direction: both codes are de (German)",
        ),
        (
            {"languages": ["Germn"]},
            "'data.languages': 'Germn' is not a language code (did you mean 'de', German?)",
        ),
        (
            {"rank": {"de": 1, "deu": 2, "en": 1}, "languages": ["de"]},
            "'model.low_rank.rank': 'de' and 'deu' are one language (German), de",
        ),
        (
            {"corpora": [{"path": "a", "format": "moses", "source": "German"}], "languages": ["de"]},
            "'German' is not a language code (did you mean 'de', German?)",
        ),
    ],
)
def test_two_codes_for_one_language_are_refused(data: dict[str, Any], says: str, tmp_path):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(tmp_path, **data))
    assert says in str(error.value) and "r.yaml, line" in str(error.value)


def test_values_that_are_no_codes_are_left_to_the_checks_of_recipes():
    for recipe in (
        {},
        {"data": 3},
        {"data": {"languages": "de", "directions": {"a": 1}}},
        {"model": {"low_rank": [1]}},
    ):
        assert resolve_codes(recipe) is None
    recipe = {"data": {"languages": [False, None, ["deu"], 7]}}
    assert resolve_codes(recipe) is None and recipe["data"]["languages"] == [False, None, ["deu"], 7]


def test_a_system_keeps_its_codes(capsys):
    recipe = {"data": {"languages": ["zh", "eng", "hi", "qaa"]}}
    assert resolve_codes(recipe, ["zh_CN", "eng_Latn", "qaa"]) is None
    assert recipe["data"]["languages"] == ["zh_CN", "eng_Latn", "hi", "qaa"]
    said = capsys.readouterr().err
    assert "'zh' is read as 'zh_CN' (Chinese (Simplified))" in said and "not in the table" not in said
    both = {"data": {"languages": ["nb", "no"]}}
    assert resolve_codes(both, ["nb", "no"]) is None and both["data"]["languages"] == ["nb", "no"]
    assert resolve_codes(both, ["no"]) == (
        "data.languages",
        "'nb' and 'no' are one language (Norwegian), no: write one of them",
    )


def test_languages_are_found_by_any_code():
    languages = Languages(
        (Direction("eng_Latn", "zh_CN"), Direction("zh_CN", "eng_Latn"), Direction("eng_Latn", "no"))
    )
    assert [languages.id(code) for code in ("en", "eng_Latn", "nb", "zho_Hans")] == [0, 0, 1, 2]
    assert languages.find(Direction("en", "zh")) == Direction("eng_Latn", "zh_CN")
    assert choose_directions(["en-zh", "zh-CN-en", ""], languages) == [
        Direction("eng_Latn", "zh_CN"),
        Direction("zh_CN", "eng_Latn"),
    ]
    with pytest.raises(UserError, match="language 'zh_Hant' is not in this system"):
        languages.id("zh_Hant")
    with pytest.raises(UserError, match="direction no-en is not in this system"):
        languages.find(Direction("no", "en"))


def test_the_table_reads_what_it_lists():
    """No code of the table is an alias of two languages, or read as another one than its row says."""
    wrong = {
        alias: entry.code
        for entry in table().values()
        for alias in (entry.code, *entry.aliases)
        if normalize_code(alias) != entry.code
    }
    assert wrong == {}
    assert all(len(entry.script) == 4 for entry in table().values())


def test_relatives_share_a_group_of_experts():
    """Dutch, English and German are Germanic; Bulgarian, Russian and Polish are Slavic."""
    languages = Languages(tuple(Direction("en", code) for code in ("bg", "de", "nl", "pl", "ru")))
    assert dict(zip(languages.tasks("target"), languages.task_groups("target", 2), strict=True)) == {
        **dict.fromkeys(("de", "en", "nl"), 0),
        **dict.fromkeys(("bg", "pl", "ru"), 1),
    }
