"""A corpus of translations: what `lsmoe translate` gives, by any number of processes, interrupted or not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.commands import main
from support.conversions import EN_DE
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run, train_and_save, write_corpus

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data import stages
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.data.stages import Work
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import translations
from lsmoe_ds.export.translations import Asked, How, translate_corpus
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import Translation, translate, translate_lines

QUICK = How(beam=2)


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("teacher"), TOKEN_TOP2, TARGET_TOP2, 2)[0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(translations, "CHUNK", 7)


def rows_of(corpus, name: str) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in (corpus / f"{name}.tsv").read_text("utf-8").splitlines()]


def sources_of(run, direction: Direction) -> list[str]:
    data = open_data(find_model(run))
    found = data.tokens(direction, "train").source
    return [data.vocabulary.decode(found[i].tolist()) for i in range(len(found))]


def content(corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.iterdir() if path.suffix == ".tsv"}


def test_the_corpus_is_what_translate_gives(run, tmp_path):
    made = translate_corpus(run, tmp_path / "out", Asked((EN_DE,)), QUICK, 0)
    sources, rows = sources_of(run, EN_DE), rows_of(tmp_path / "out", "en-de")
    wanted = []
    for first in range(0, len(sources), 7):
        wanted += translate(load(run, "cpu"), EN_DE, sources[first : first + 7], beam=2)
    pairs = [(a, b) for a, b in zip(sources, wanted, strict=True) if b.strip()]
    assert rows == pairs and len(rows) > 10
    assert made["pairs"] == {"en-de": len(pairs)} and made["empty"] == len(sources) - len(pairs)
    assert not (tmp_path / ".out.work").exists()
    assert made == json.loads((tmp_path / "out" / "PROVENANCE.json").read_text())


def test_all_trained_directions_by_any_number_of_processes(run, tmp_path):
    one = translate_corpus(run, tmp_path / "one", Asked(limit=9), QUICK, 0)
    translate_corpus(run, tmp_path / "two", Asked(limit=9), QUICK, 2)
    trained = [str(each) for each in find_model(run).recipe.trained]
    assert list(one["pairs"]) == trained and len(trained) > 2
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_an_interrupted_translation_resumes(run, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    translate_corpus(run, whole, Asked((EN_DE,), limit=25), QUICK, 0)
    calls, true = [], translations.translate_chunk

    def failing(*arguments, **more):
        calls.append(more["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*arguments, **more)

    monkeypatch.setitem(translations.FUNCTIONS, "translate", failing)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        translate_corpus(run, out, Asked((EN_DE,), limit=25), QUICK, 0)
    assert not out.exists()
    translate_corpus(run, out, Asked((EN_DE,), limit=25), QUICK, 0)
    assert calls == [0, 7, 14, 14, 21], "what is finished is not done again"
    assert content(out) == content(whole)
    translate_corpus(run, out, Asked((EN_DE,), limit=25), QUICK, 0)
    assert len(calls) == 5 and "is there already" in capsys.readouterr().err
    translate_corpus(run, out, Asked((EN_DE,), limit=25), How(beam=3), 0)
    assert len(calls) == 9, "by another beam all is done anew"


def test_another_process_helps(run, tmp_path, monkeypatch):
    """A helper that has done a chunk before the leader comes to it, which the leader then takes."""
    true, helped = Work.publish, []

    def publish(self, tasks):
        true(self, tasks)
        if tasks and not helped:
            helped.append(stages.attempt(self.folder, self.functions, tasks[1], run=self.run))

    monkeypatch.setattr(Work, "publish", publish)
    translate_corpus(run, tmp_path / "helped", Asked((EN_DE,), limit=20), QUICK, 0)
    monkeypatch.undo()
    monkeypatch.setattr(translations, "CHUNK", 7)
    translate_corpus(run, tmp_path / "alone", Asked((EN_DE,), limit=20), QUICK, 0)
    assert helped[0]["lines"] == 7 and content(tmp_path / "helped") == content(tmp_path / "alone")


def test_text_of_ones_own_and_back(run, tmp_path):
    lines = ["ba de fi", "", "ko  la mi nobu ", "tabi refu\tgosi kale"]
    (tmp_path / "mono.en").write_text("".join(f"{line}\n" for line in lines))
    asked = Asked((EN_DE,), tmp_path / "mono.en", back=True)
    made = translate_corpus(run, tmp_path / "back", asked, QUICK, 0)
    clean = [" ".join(line.split()) for line in lines]
    wanted = list(translate(load(run, "cpu"), EN_DE, clean, beam=2))
    rows = rows_of(tmp_path / "back", "de-en")
    assert rows == [(b, a) for a, b in zip(clean, wanted, strict=True) if a and b]
    assert made["pairs"] == {"de-en": len(rows)} and made["empty"] >= 1


def test_sampled_sources_with_a_tag_for_back_translation(run, tmp_path):
    text = tmp_path / "mono.de"
    text.write_text("".join(f"{line}\n" for line in ["ba de fi", "ko la mi", "lu ki"] * 3), encoding="utf-8")
    asked = Asked((EN_DE,), text, back=True, samples=2, tag="BT")
    how = How(temperature=1.0, seed=5)
    made = translate_corpus(run, tmp_path / "one", asked, how, 0)
    translate_corpus(run, tmp_path / "two", asked, how, 2)
    translate_corpus(run, tmp_path / "other", asked, How(temperature=1.0, seed=6), 0)
    assert content(tmp_path / "one") == content(tmp_path / "two") != content(tmp_path / "other")
    rows = rows_of(tmp_path / "one", "de-en")
    assert len(rows) == made["pairs"]["de-en"] == 18 - made["empty"]
    assert all(source.startswith("BT ") and target in text.read_text() for source, target in rows)
    of_one = [source for source, target in rows if target == "ba de fi"]
    assert len(of_one) > 3 and len(set(of_one)) == 2  # two draws; a line that is repeated has the same


def test_the_n_best_translations_of_each_line(run, tmp_path, monkeypatch):
    """They are those of one search, for any number of processes, and after an interruption."""
    asked, how = Asked((EN_DE,), limit=17), How(beam=4, n_best=3)
    made = translate_corpus(run, tmp_path / "one", asked, how, 0)
    sources, loaded, wanted = sources_of(run, EN_DE)[:17], load(run, "cpu"), []
    for first in range(0, len(sources), 7):
        lines = sources[first : first + 7]
        found = translate_lines(loaded, EN_DE, lines, Search(4, n_best=3))
        wanted += [
            (line, text)
            for line, each in zip(lines, found, strict=True)
            for text in dict.fromkeys(translation.text for translation in each)
            if text
        ]
    rows = rows_of(tmp_path / "one", "en-de")
    assert rows == wanted and len(rows) == len(set(rows)) > 34 and made["pairs"] == {"en-de": len(rows)}
    assert made["settings"]["n_best"] == 3
    translate_corpus(run, tmp_path / "two", asked, how, 2)
    true = translations.translate_chunk

    def failing(*arguments, **more):
        if more["first"] == 7:
            raise KeyboardInterrupt
        return true(*arguments, **more)

    monkeypatch.setitem(translations.FUNCTIONS, "translate", failing)
    with pytest.raises(KeyboardInterrupt):
        translate_corpus(run, tmp_path / "cut", asked, how, 0)
    monkeypatch.setitem(translations.FUNCTIONS, "translate", true)
    translate_corpus(run, tmp_path / "cut", asked, how, 0)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "cut")


def test_a_text_is_written_once_for_a_line_and_never_empty(run, tmp_path, monkeypatch):
    """Different tokens may give the same text; each of two equal lines has its own pairs."""
    texts = {"ba": ["x", "y", "x"], "de": ["", "z"], "fi": [""], "": [""]}
    monkeypatch.setattr(
        translations,
        "translate_lines",
        lambda engine, direction, lines, search, advance: [
            [Translation(text, 0.0) for text in texts[line]] for line in lines
        ],
    )
    (tmp_path / "mono.en").write_text("ba\nde\nfi\n\nba\n")
    asked = Asked((EN_DE,), tmp_path / "mono.en", back=True, tag="BT")
    made = translate_corpus(run, tmp_path / "out", asked, How(n_best=3), 0)
    rows = [("BT x", "ba"), ("BT y", "ba"), ("BT z", "de"), ("BT x", "ba"), ("BT y", "ba")]
    assert rows_of(tmp_path / "out", "de-en") == rows
    assert made["pairs"] == {"de-en": 5} and made["empty"] == 3


def test_a_corpus_that_was_searched_for_is_known_again_by_its_old_settings(run):
    settings = How(beam=2).to_dict()
    assert settings == {"beam": 2, "length_penalty": 1.0, "route": "specific", "engine": None, "average": 1}


def test_a_text_that_changes_is_translated_anew(run, tmp_path, capsys):
    text, out = tmp_path / "mono.en", tmp_path / "out"
    for lines, again in ((["ba de fi"], False), (["ba de fi"], True), (["ko la mi"], False)):
        text.write_text("".join(f"{line}\n" for line in lines))
        made = translate_corpus(run, out, Asked((EN_DE,), text), QUICK, 0)
        said = capsys.readouterr().err
        assert ("is there already" in said) == again
        assert ("has a corpus with other settings (text): it is replaced" in said) == (lines == ["ko la mi"])
        assert [row[0] for row in rows_of(out, "en-de")] == lines[: made["pairs"]["en-de"]]


def test_a_student_trains_on_it(run, tmp_path):
    translate_corpus(run, tmp_path / "teacher", Asked((EN_DE,)), QUICK, 0)
    value = find_model(run).recipe.model_dump(mode="json", exclude_none=True)
    value["name"] = value["data"]["name"] = "student"
    value["data"]["corpora"].append({"path": str(tmp_path / "teacher"), "format": "translated"})
    value["data"]["train_on"] = "translated"
    value["data"]["vocabulary"]["file"] = str(run / "vocabulary.model")  # to begin with the teacher's weights
    data = prepare(Recipe.model_validate(value))
    assert len(data.tokens(EN_DE, "train")) and not len(data.tokens(EN_DE.reverse, "train"))
    before = open_data(find_model(run))
    assert data.text(EN_DE, "test") == before.text(EN_DE, "test"), "the student is tested as the teacher is"


def test_a_direction_without_training_text_is_left_out(pool, tmp_path, capsys):
    write_corpus(tmp_path)
    text = tmp_path / "text.tsv"
    head, *rows = [line.split("\t") for line in text.read_text().splitlines()]
    held_out, rows = rows[:50], [[a, b, ""] if n % 2 else [a, "", c] for n, (a, b, c) in enumerate(rows[50:])]
    text.write_text("".join("\t".join(row) + "\n" for row in (head, *rows)))
    for column, code in enumerate(("eng_Latn", "deu_Latn", "fra_Latn")):
        for split, lines in (("dev", held_out[:25]), ("devtest", held_out[25:])):
            path = tmp_path / "flores" / split / f"{code}.{split}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line[column]}\n" for line in lines))
    value = make_recipe(tmp_path, TARGET_TOP2, TARGET_TOP2).model_dump(mode="json", exclude_none=True)
    value["data"]["corpora"].append({"path": str(tmp_path / "flores"), "format": "flores"})
    value["data"] |= {"languages": ["en", "de", "fr"], "directions": ["en-de", "fr-en", "de-fr"]}
    recipe = Recipe.model_validate(value)
    data = prepare(recipe)
    open_run(recipe, tmp_path / "run", data.folder / "vocabulary.model")
    pool.run(1, train_and_save, recipe, tmp_path / "run", data.vocabulary.size, tensor=1, expert=1)
    made = translate_corpus(tmp_path / "run", tmp_path / "out", Asked(limit=9), QUICK, 0)
    assert "there is no training text to translate for de-fr\n" in capsys.readouterr().err
    assert list(made["pairs"]) == ["en-de", "fr-en"]
    with pytest.raises(
        UserError, match=r"nothing to translate for de-fr: the training text in .* has no line"
    ):
        translate_corpus(tmp_path / "run", tmp_path / "none", Asked((Direction("de", "fr"),)), QUICK, 0)
    text = tmp_path / "mono.fr"
    text.write_text("ba de fi\n")
    translate_corpus(tmp_path / "run", tmp_path / "zero", Asked((Direction("fr", "de"),), text), QUICK, 0)
    assert "the model was not trained on fr-de (zero-shot)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "mono"], "--text is in one language: name the direction"),
        (["--direction", "en-xx"], "xx"),
        (["--direction", "en-de", "--text", "nowhere"], "nowhere"),
        (["--direction", "en-de", "--text", "blank"], "nothing to translate for en-de: blank has no line"),
        (["--route", "shared"], "no parameters for the route 'shared'"),
        (["--samples", "2"], "--samples, --top-k and --seed are for sampled translations: add --sample"),
        (["--sample", "0"], "the temperature is 0.0: it must be a number above 0"),
        (["--sample", "1", "--engine", "ctranslate2"], "--sample is for models that lsmoe_ds translates"),
        (["--n-best", "2", "--sample", "1"], "--n-best is for a search: choose --samples with --sample"),
        (["--n-best", "6"], "6 best translations are wanted of a beam of 5: choose from 1 to 5, or a larger"),
        (["--tag", "BT"], "--tag marks sources that are translations: it is for --back"),
        (["--back", "--tag", "a b"], "--tag is 'a b': it must be one word"),
    ],
)
def test_what_is_not_possible_is_said(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("blank").write_text("\n  \n")
    assert main(["translate", str(run), "--corpus", str(tmp_path / "out"), "--workers", "0", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["blank"]


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 5)], ids=["gone", "cut"])
def test_a_damaged_corpus_is_translated_again(run, tmp_path, capsys, damage):
    out, asked = tmp_path / "out", Asked((EN_DE,), limit=9)
    translate_corpus(run, out, asked, QUICK, 0)
    before = (out / "en-de.tsv").read_bytes()
    damage(out / "en-de.tsv")
    translate_corpus(run, out, asked, QUICK, 0)
    assert "en-de.tsv" in (said := capsys.readouterr().err) and "everything is translated again" in said
    assert (out / "en-de.tsv").read_bytes() == before


def test_nothing_of_others_is_written_over(run, tmp_path, capsys):
    translate_corpus(run, tmp_path / "out", Asked((EN_DE,), limit=9), QUICK, 0)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out holds mine.txt, which would be lost: choose another folder"):
        translate_corpus(run, tmp_path / "out", Asked((EN_DE,), limit=8), QUICK, 0)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not made by `lsmoe translate --corpus`"):
        translate_corpus(run, tmp_path / "notes", Asked(), QUICK, 0)
    assert main(["translate", str(run), "--direction", "en-de", "--back"]) == 2
    assert "--back is for --corpus" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "notes")
