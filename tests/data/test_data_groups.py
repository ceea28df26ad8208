"""Resource groups of languages: lists in the recipe, or thresholds on the prepared data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from support.small_corpora import recipe, write_three_bitexts

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.groups import Groups
from lsmoe_ds.data.groups import with_listed_groups
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training import start

LISTS = {"high": ["en", "de"], "medium": ["fr"], "very_low": ["ru"]}
LISTED = {"en": "high", "de": "high", "fr": "medium", "ru": "very_low"}
THRESHOLDS = {"high": 260, "medium": 200}  # 270 training pairs of de-en and en-ru, 220 of en-fr


def written(folder: Path, groups: object, **data: object) -> Path:
    value = yaml.safe_load(recipe(folder).to_yaml())
    del value["data"]["directions"]
    value["data"] |= {"groups": groups, **data}
    (folder / "r.yaml").write_text(yaml.safe_dump(value))
    return folder / "r.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_three_bitexts(directory)
    prepare(recipe(directory))
    return directory


def test_nothing_stands_for_the_default(tmp_path: Path) -> None:
    found = load_recipe(written(tmp_path, LISTS), ["data.groups=null"])
    assert found.data.groups == Groups() == load_recipe(written(tmp_path, None)).data.groups


def test_listed_groups_of_languages_and_bitexts(tmp_path: Path) -> None:
    lists = {**LISTS, "high": ["eng_Latn", "de"]}
    found = load_recipe(written(tmp_path, lists))
    assert found.languages.groups == LISTED
    assert found.data.groups.of_bitext("de-en", 5) == "high"
    assert found.data.groups.of_bitext("en-fr", 5) == "medium"
    assert found.data.groups.of_bitext("fr-ru", 10**9) == "very_low"
    (tmp_path / "stored.yaml").write_text(found.to_yaml())
    assert load_recipe(tmp_path / "stored.yaml") == found


def test_all_directions(tmp_path: Path) -> None:
    found = load_recipe(written(tmp_path, LISTS, languages=["de", "fra", "ru", "en"], directions="all"))
    assert len(found.data.directions) == 12 and found.data.directions[:2] == ["de-fr", "de-ru"]
    without = load_recipe(written(tmp_path, {}, languages=["de", "fr"], directions="all"))
    assert without.data.directions == ["de-fr", "fr-de"]
    with pytest.raises(UserError, match="'directions' is all: 'languages' must list at least two languages"):
        load_recipe(written(tmp_path, {}, languages=["de"], directions="all"))


def test_thresholds_name_no_group_of_a_language() -> None:
    assert recipe(Path("data")).languages.groups == {}
    four = Groups(high=100, medium=50, low=10)
    assert [four.of(pairs) for pairs in (100, 99, 49, 9)] == ["high", "medium", "low", "very_low"]
    assert [Groups(high=100, medium=50).of(pairs) for pairs in (50, 49)] == ["medium", "low"]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"high": ["en", "de"], "low": ["fr"]}, "'groups' lacks ru"),
        ({**LISTS, "low": ["de"]}, "de is in the groups twice"),
        ({**LISTS, "low": ["nl"]}, "'groups' names nl, which is no language of the recipe (de, en, fr, ru)"),
        ({"high": ["en"], "medium": 10}, "'high' is a list and 'medium' a number"),
        ({"low": 200_000}, "'low' is 200000, which is more than 100000, the value of 'medium'"),
        ({"very_low": 5}, "'data.groups.very_low' should be a list of texts, found 5"),
        ({"high": 0}, "should be at least 1, found 0"),
        ({"high": ["German"]}, "'data.groups.high': 'German' is not a language code"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe(written(tmp_path, groups))


def test_a_language_has_the_group_of_its_largest_bitext(root: Path) -> None:
    found = PreparedData.of(recipe(root, groups=THRESHOLDS))
    sizes = {name: splits["train"]["pairs"] for name, splits in found.manifest["bitexts"].items()}
    assert sizes["de-en"] >= 260 > sizes["en-fr"] >= 200, sizes
    assert found.language_groups() == {"de": "high", "en": "high", "fr": "medium", "ru": "high"}
    assert PreparedData.of(recipe(root, groups=LISTS)).language_groups() == LISTED


def test_thresholds_become_lists(root: Path) -> None:
    listed = with_listed_groups(recipe(root, groups=THRESHOLDS))
    assert listed.data.groups == Groups(high=["de", "en", "ru"], medium=["fr"])
    assert listed.languages.groups["fr"] == "medium"
    unchanged = recipe(root, groups=LISTS, directory="/nowhere")
    assert with_listed_groups(unchanged) == unchanged


def with_clsr(folder: Path) -> object:
    value = recipe(folder, groups=THRESHOLDS).model_dump()
    value["model"]["clsr"] = {}
    return type(recipe(folder)).model_validate(value)


def test_training_and_plan_list_the_groups_only_for_a_method_that_needs_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, str]] = []

    def begin(given, run, processes, traced) -> int:
        trained.append(dict(given.languages.groups))
        return 0

    def check(self, languages) -> None:
        if languages.groups and "low" not in languages.groups.values():
            raise ValueError("it needs a language of the group low")

    monkeypatch.setattr(start, "_start", begin)
    start.train(with_clsr(root), tmp_path, 1)
    monkeypatch.setattr(Clsr, "needs_groups", property(lambda self: True))
    start.train(with_clsr(root), tmp_path, 1)
    assert trained == [{}, {"de": "high", "en": "high", "fr": "medium", "ru": "high"}]
    assert plan(with_clsr(root)).parameters
    with pytest.raises(UserError, match=r"'data\.groups' has thresholds and there is no prepared data in"):
        plan(with_clsr(tmp_path))
    monkeypatch.setattr(Clsr, "check_languages", check)
    with pytest.raises(UserError, match="with the groups of its prepared data: it needs a language of the"):
        start.train(with_clsr(root), tmp_path, 1)
