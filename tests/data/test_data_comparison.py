"""Prepared data know what they are: whoever reads them compares the recipe with what was prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_corpora import pairs, recipe, write_fetched, write_lines, write_three_bitexts
from support.starts import changed

from lsmoe_ds.checkpoint.run_folder import check_run, open_run
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.data import Data
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.comparison import ORIGIN, data_directories, settings_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData, open_data
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError
from lsmoe_ds.training.start import check

COVERAGE = {"character_coverage": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prepared data named ``small``, a run ``run``, and the vocabulary alone."""
    root = tmp_path_factory.mktemp("made")
    write_three_bitexts(root)
    data = prepare(recipe(root))
    open_run(recipe(root), root / "run", data.folder / "vocabulary.model")
    shutil.copy(data.folder / "vocabulary.model", root)
    return root


CHANGES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"corpora": ["django", "wagtail"]}, "data.corpora", "django, wagtail", "django"),
    (
        {"languages": ["de", "fr"]},
        "data.directions",
        "de-en, en-de, en-fr, fr-en",
        "de-en, en-de, en-fr, en-ru, fr-en, ru-en",
    ),
    (
        {"languages": [], "directions": ["en-de"]},
        "data.directions",
        "en-de",
        "de-en, en-de, en-fr, en-ru, fr-en, ru-en",
    ),
    ({"vocabulary": {"size": 200, **COVERAGE}}, "data.vocabulary.size", "200", "120"),
    ({"vocabulary": {"size": 120, "type": "bpe", **COVERAGE}}, "data.vocabulary.type", "bpe", "unigram"),
    ({"vocabulary": {"size": 120}}, "data.vocabulary.character_coverage", "0.9995", "1.0"),
    ({"vocabulary": {"size": 120, "sentences": 5, **COVERAGE}}, "data.vocabulary.sentences", "5", "1000000"),
    ({"vocabulary": {"size": 120, "file": "v.model"}}, "data.vocabulary.file", "v.model", "nothing"),
    ({"cleaning": {"min_words": 2}}, "data.cleaning.min_words", "2", "3"),
    ({"cleaning": {"max_words": 9}}, "data.cleaning.max_words", "9", "200"),
    ({"cleaning": {"identified": 0.5}}, "data.cleaning.identified", "0.5", "nothing"),
    ({"cleaning": {"script_share": 0.9}}, "data.cleaning.script_share", "0.9", "0.5"),
    ({"held_out": {"dev": 11, "test": 20}}, "data.held_out.dev", "11", "10"),
    ({"held_out": {"dev": 10, "test": 21}}, "data.held_out.test", "21", "20"),
    ({"held_out": {"dev": 10, "test": 20, "seed": 2}}, "data.held_out.seed", "2", "1"),
    ({"temperature": 1.0}, "data.temperature", "1.0", "5.0"),
    ({"pivot": "en"}, "data.pivot", "en", "nothing"),
    ({"max_pairs": 50}, "data.max_pairs", "50", "nothing"),
]


@pytest.mark.parametrize(
    ("change", "key", "now", "was"), CHANGES, ids=[f"{case[1]}={case[2]}" for case in CHANGES]
)
def test_every_reader_refuses_data_that_were_prepared_otherwise(
    made: Path, change: dict[str, Any], key: str, now: str, was: str
) -> None:
    changed = recipe(made, **change)
    of_run = SimpleNamespace(recipe=changed, home=made / "elsewhere")
    readers = [lambda: PreparedData.of(changed), lambda: show(changed), lambda: check(changed, made / "new")]
    if key != "data.directions":  # a converted folder serves some of the directions
        readers.append(lambda: open_data(of_run))
    for read in readers:
        with pytest.raises(UserError) as error:
            read()
        before = "was prepared without it" if was == "nothing" else f"was prepared with {was}"
        assert str(error.value).startswith(f"'{key}' is {now}, but {made}/prepared/small {before}: ")
    assert not (made / "new").exists()


def test_all_that_shapes_the_data_is_compared() -> None:
    """A key that is added to ``data`` must be compared, or be named here as one that the prepared data do not
    depend on.
    """
    compared = {change[1].split(".")[1] for change in CHANGES}
    free = {
        "name",
        "directory",
        "languages",
        "groups",
        "batch",
        "tags",
        "prompt",
        "labels",
        "stride",
        "train_on",
    }  # languages become directions, all have tags, prompts are put around tokens; the last three need other
    # corpora (tests/model/test_encoders.py, tests/data/test_data_translated.py)
    assert compared | free == set(Data.model_fields)
    for section in ("vocabulary", "cleaning", "held_out"):
        tried = {change[1].split(".")[2] for change in CHANGES if change[1].startswith(f"data.{section}.")}
        assert tried == set(Data.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]


def test_what_prepared_data_do_not_depend_on_may_differ(made: Path) -> None:
    changed = recipe(
        made,
        "other",
        languages=["ru", "fr", "de"],
        batch={"tokens": 64},
        groups={"high": 7, "medium": 7},
        name="small",
    )
    changed = changed.model_copy(update={"data": changed.data.model_copy(update={"tags": "source-target"})})
    assert PreparedData.of(changed).languages.directions == changed.languages.directions
    assert show(changed).folder == str(made / "prepared" / "small")
    DirectionIds.of(changed.languages, PreparedData.of(changed).vocabulary, changed.data.tags)


def test_a_given_vocabulary_does_not_depend_on_how_one_would_be_trained(made: Path) -> None:
    files = [
        {"file": made / "vocabulary.model", "size": 120, **more} for more in ({}, COVERAGE, {"sentences": 7})
    ]
    first, *others = (
        settings_of(recipe(made, vocabulary=file, temperature=t))
        for file, t in zip(files, (1.0, 2.0, 5.0), strict=True)
    )
    assert all(other == first for other in others) and "temperature" not in first


def test_a_vocabulary_is_known_by_its_content(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a model trained here starts from is the vocabulary that was prepared, in another place."""
    same = recipe(
        made,
        "tuned",
        name="small",
        vocabulary={"file": made / "vocabulary.model", "size": 120},
        temperature=2.0,
    )
    assert PreparedData.of(same).folder == made / "prepared" / "small"
    capsys.readouterr()
    prepare(same)
    assert "up to date" in capsys.readouterr().err
    for wrong, now in (({"size": 121}, "121"), ({"type": "bpe"}, "bpe")):
        with pytest.raises(
            UserError, match=f"'data.vocabulary.{next(iter(wrong))}' is {now}, but .* was prepared with"
        ):
            PreparedData.of(
                recipe(
                    made, name="small", vocabulary={"file": made / "vocabulary.model", "size": 120, **wrong}
                )
            )
    (made / "changed.model").write_bytes((made / "vocabulary.model").read_bytes() + b"\0")
    with pytest.raises(
        UserError, match=r"'data.vocabulary.file' is .*changed.model, but .* was prepared without it"
    ):
        PreparedData.of(recipe(made, name="small", vocabulary={"file": made / "changed.model", "size": 120}))


def test_recipes_share_data_by_name(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = recipe(made, "variant", name="small")
    assert (variant.prepared, recipe(made, "variant").prepared) == (
        made / "prepared/small",
        made / "prepared/variant",
    )
    capsys.readouterr()
    assert prepare(variant).folder == made / "prepared" / "small"
    assert "up to date" in capsys.readouterr().err


def test_an_old_run_is_resumed_under_a_name_for_its_data(made: Path) -> None:
    vocabulary = made / "prepared" / "small" / "vocabulary.model"
    check_run(recipe(made), made / "run", vocabulary)
    check_run(recipe(made, "small", name="small"), made / "run", vocabulary)
    (made / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"was started with name small, the recipe now has variant"):
        check_run(recipe(made, "variant", name="small"), made / "run", vocabulary)


def test_a_section_that_a_resumed_run_lacks_is_named(made: Path) -> None:
    vocabulary = made / "vocabulary.model"
    plain, averaged = recipe(made), changed(recipe(made), training={"ema": {}})
    for begun, now, said in (
        (plain, averaged, "without training.ema, the recipe now has one"),
        (averaged, plain, "with training.ema, the recipe now has none"),
    ):
        run = made / ("averaged" if begun is averaged else "plain")
        open_run(begun, run, vocabulary)
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        with pytest.raises(UserError, match=f"was started {said}: set it back"):
            check_run(now, run, vocabulary)


def again(root: Path, start: int) -> None:
    """Prepare the text from sentence ``start`` on, with the same settings and the existing vocabulary."""
    write_lines(
        root / "x.tsv", ["de\ten", *("\t".join(pair) for pair in pairs("de", "en", 200, start=start))]
    )
    prepare(with_file(root))


def with_file(root: Path) -> Recipe:
    corpora = [{"path": str(root / "x.tsv"), "format": "tsv"}]
    return recipe(
        root, corpora=corpora, languages=["de"], vocabulary={"file": root / "vocabulary.model", "size": 120}
    )


def test_other_text_under_the_same_settings_and_vocabulary(made: Path, tmp_path: Path) -> None:
    """Its test set may have been trained on: evaluating and resuming say so."""
    shutil.copy(made / "vocabulary.model", tmp_path)
    again(tmp_path, start=0)
    settings, run = with_file(tmp_path), tmp_path / "run"
    vocabulary = settings.prepared / "vocabulary.model"
    open_run(settings, run, vocabulary)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    loaded = SimpleNamespace(recipe=settings, home=run)
    again(tmp_path, start=0)
    assert open_data(loaded).folder == settings.prepared
    again(tmp_path, start=300)
    for read in (lambda: open_data(loaded), lambda: check_run(settings, run, vocabulary)):
        with pytest.raises(UserError, match=r"is not what .*run was trained on: it was prepared anew"):
            read()
    (run / ORIGIN).unlink()  # a run of an older version does not know
    assert open_data(loaded).folder == settings.prepared


def test_a_converted_folder_serves_some_of_the_directions(made: Path) -> None:
    some = recipe(made, languages=[], directions=["en-fr"])
    home = made / "converted"
    home.mkdir(exist_ok=True)
    shutil.copy(made / "vocabulary.model", home)
    data = open_data(SimpleNamespace(recipe=some, home=home))
    assert [str(direction) for direction in data.languages.directions] == ["en-fr"]
    shutil.copy(made / "corpora/django/de-en.tsv", home / "vocabulary.model")
    with pytest.raises(
        UserError, match=r"the vocabulary in .*small is not that of .*converted: it was prepared anew"
    ):
        open_data(SimpleNamespace(recipe=some, home=home))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with prepared data and the run ``out/here/x``, whose recipe has relative paths.

    The working directory is elsewhere.
    """
    place = tmp_path / "project"
    place.mkdir()
    monkeypatch.chdir(place)
    write_fetched(Path("data"), "django", {"de-en": pairs("de", "en", 200)})
    settings = recipe(Path("data"), languages=["de"])
    open_run(settings, Path("out/here/x"), prepare(settings).folder / "vocabulary.model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def found_for(run: Path) -> Path:
    return open_data(SimpleNamespace(recipe=load_recipe(run / "recipe.yaml"), home=run)).folder


def test_the_data_of_a_run_are_found_from_anywhere(project: Path) -> None:
    assert found_for(project / "out/here/x") == project / "data/prepared/small"
    assert found_for(Path("../project/out/here/x")) == project / "data/prepared/small"


def test_a_run_that_was_moved_finds_its_data(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "out/here/x", tmp_path / "elsewhere/moved")
    assert found_for(tmp_path / "elsewhere/moved") == project / "data/prepared/small"


def test_a_copied_project_is_whole(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "deep/copy")
    shutil.rmtree(project)
    assert found_for(tmp_path / "deep/copy/out/here/x") == tmp_path / "deep/copy/data/prepared/small"


def test_the_nearest_data_that_fit_are_taken(project: Path) -> None:
    """Nearer to the run lie others under the same name."""
    other = recipe(project / "out/data", languages=["de"], held_out={"dev": 5, "test": 20})
    write_fetched(project / "out/data", "django", {"de-en": pairs("de", "en", 200)})
    prepare(other)
    assert found_for(project / "out/here/x") == project / "data/prepared/small"
    shutil.rmtree(project / "data")
    with pytest.raises(
        UserError, match=r"'data.held_out.dev' is 10, but .*out/data/prepared/small was prepared with 5"
    ):
        found_for(project / "out/here/x")


def test_where_was_looked_is_said(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / "data")
    with pytest.raises(UserError) as error:
        found_for(project / "out/here/x")
    assert "there is no prepared data" in str(error.value) and "lsmoe data prepare" in str(error.value)
    loaded = load_recipe(project / "out/here/x/recipe.yaml")
    looked = data_directories(loaded, project / "out/here/x")
    assert {project / "data", project / "out/data", tmp_path / "elsewhere/data"} <= set(looked)
    with pytest.raises(
        UserError,
        match=f"there is no prepared data in data/prepared/small .looked for {tmp_path}/elsewhere/data/prep",
    ):
        PreparedData.of(loaded)


def test_a_vocabulary_that_has_changed_is_damage_wherever_it_is_used(made: Path, tmp_path: Path) -> None:
    """Another vocabulary of the same size would be read without a word, and every piece be another one."""
    run, vocabulary = tmp_path / "run", made / "prepared" / "small" / "vocabulary.model"
    open_run(recipe(made), run, vocabulary)
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    content = bytearray((run / "vocabulary.model").read_bytes())
    content[-5] ^= 1
    (run / "vocabulary.model").write_bytes(content)
    for read in (lambda: find_model(run), lambda: check_run(recipe(made), run, vocabulary)):
        with pytest.raises(UserError, match=r"run is damaged: .*vocabulary\.model is not as it was written"):
            read()
    (run / "vocabulary.model").unlink()
    for read in (lambda: find_model(run), lambda: check_run(recipe(made), run, vocabulary)):
        with pytest.raises(UserError, match=r"run is damaged: .*vocabulary\.model is missing"):
            read()
    shutil.copy(vocabulary, run)
    check_run(recipe(made), run, vocabulary)
    assert find_model(run).home == run


def test_held_out_text_of_the_same_size_and_other_bytes_is_damage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "copy")
    small = recipe(tmp_path / "copy")
    data, direction = PreparedData.of(small), small.languages.directions[0]
    data.text(direction, "test")
    file = data.folder / "test" / direction.bitext / f"{direction.target}.txt"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"?\n")
    data = PreparedData.of(small)  # what is open was compared once
    with pytest.raises(UserError, match=r"prepared data is damaged: .*\.txt.*sha256 differs"):
        data.text(direction, "test")
    data.text(direction, "dev")
    capsys.readouterr()
    prepare(small)
    assert "up to date" not in capsys.readouterr().err and file.read_bytes() == content


def test_a_damaged_origin_is_one_sentence(project: Path) -> None:
    (project / "out/here/x" / ORIGIN).write_text(json.dumps({"directory": 3}))
    with pytest.raises(UserError, match=r"origin.json is damaged: 'directory' should be text"):
        found_for(project / "out/here/x")


def test_a_run_through_a_link_that_leads_to_nothing_yet(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real/run")
    open_run(recipe(made), tmp_path / "link", made / "prepared/small/vocabulary.model")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/run/recipe.yaml").is_file()
