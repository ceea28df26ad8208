"""A corpus of translations: what `lsmoe translate` gives, by any number of processes, interrupted or not."""

from __future__ import annotations

import json
import shutil

import pytest
from small_run import TARGET_TOP2, TOKEN_TOP2, make_run
from test_bad_input import main
from test_convert import EN_DE

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
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate

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


def test_a_text_that_changes_is_translated_anew(run, tmp_path, capsys):
    text, out = tmp_path / "mono.en", tmp_path / "out"
    for lines, again in ((["ba de fi"], False), (["ba de fi"], True), (["ko la mi"], False)):
        text.write_text("".join(f"{line}\n" for line in lines))
        made = translate_corpus(run, out, Asked((EN_DE,), text), QUICK, 0)
        assert ("is there already" in capsys.readouterr().err) == again
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "mono"], "--text is in one language: name the direction"),
        (["--direction", "en-xx"], "xx"),
        (["--direction", "en-de", "--text", "nowhere"], "nowhere"),
        (["--route", "shared"], "no parameters for the route 'shared'"),
    ],
)
def test_what_is_not_possible_is_said(run, tmp_path, capsys, arguments, message):
    assert main(["translate", str(run), "--corpus", str(tmp_path / "out"), "--workers", "0", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_of_others_is_written_over(run, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not made by `lsmoe translate --corpus`"):
        translate_corpus(run, tmp_path / "notes", Asked(), QUICK, 0)
    assert main(["translate", str(run), "--direction", "en-de", "--back"]) == 2
    assert "--back is for --corpus" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "notes")
