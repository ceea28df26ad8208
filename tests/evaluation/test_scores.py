"""Scores against direct calls of sacrebleu, averages by hand, and what is read back."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from sacrebleu.metrics import BLEU, CHRF
from support.invented_scores import fake, translated

from lsmoe_ds.config.groups import Groups
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation import metrics as module
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.groups import resource_groups
from lsmoe_ds.evaluation.metrics import bleu_tokenizer
from lsmoe_ds.evaluation.scores import ScoreTable

SOURCES = ["The page has been saved.", "Show the changes of the user", "MediaWiki 1.39"]
HYPOTHESES = ["Die Seite wurde gespeichert.", "Zeige Benutzer", "MediaWiki 1.39"]
REFERENCES = ["Die Seite wurde gespeichert.", "Änderungen des Benutzers anzeigen", "MediaWiki 1.39"]


def test_scores_are_sacrebleus() -> None:
    score = score_direction(Direction("en", "de"), SOURCES, HYPOTHESES, REFERENCES, seconds=2.5)
    for lines, found in ((HYPOTHESES, score.metrics), (SOURCES, score.copy)):
        assert found["bleu"] == BLEU().corpus_score(lines, [REFERENCES]).score
        assert found["chrf"] == CHRF().corpus_score(lines, [REFERENCES]).score
        assert found["chrfpp"] == CHRF(word_order=2).corpus_score(lines, [REFERENCES]).score
    assert score.metrics["chrf"] > score.copy["chrf"] > 0
    assert (
        "tok:13a" in score.signatures["bleu"]
        and "nw:0" in score.signatures["chrf"]
        and "nw:2" in score.signatures["chrfpp"]
    )
    assert score.sentences == 3 and score.seconds == 2.5
    assert score.exact == pytest.approx(2 / 3)
    single = [CHRF().sentence_score(h, [r]).score for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert score.weak == sum(s < 30 for s in single) / 3


def test_perfect_and_empty_outputs() -> None:
    perfect = score_direction(Direction("en", "de"), SOURCES, REFERENCES, REFERENCES)
    assert perfect.metrics["chrf"] == pytest.approx(100) and perfect.exact == 1 and perfect.weak == 0
    empty = score_direction(Direction("en", "de"), SOURCES, [""] * 3, REFERENCES)
    assert empty.metrics == translated(0, 0, 0) and empty.weak == 1


def test_bleu_of_chinese_is_over_its_characters() -> None:
    score = score_direction(Direction("en", "zh_Hans"), ["a b"], ["显示更改和历史"], ["显示更改和日志"])
    assert "tok:zh" in score.signatures["bleu"]
    assert (
        score.metrics["bleu"]
        == BLEU(tokenize="zh").corpus_score(["显示更改和历史"], [["显示更改和日志"]]).score
        > 0
    )


@pytest.mark.parametrize(
    ("target", "installed", "without"),
    [
        ("de", "13a", "13a"),
        ("zh", "zh", "zh"),
        ("yue", "zh", "zh"),
        ("ja", "ja-mecab", "char"),
        ("ko", "ko-mecab", "13a"),
        ("th", "char", "char"),
    ],
)
def test_tokenizer_of_each_language(
    target: str, installed: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_installed", lambda *names: True)
    assert bleu_tokenizer(target) == installed
    monkeypatch.setattr(module, "_installed", lambda *names: False)
    assert bleu_tokenizer(target) == without


def test_japanese_can_be_scored_with_what_is_installed() -> None:
    score = score_direction(Direction("en", "ja"), ["a"], ["変更を表示する"], ["変更を表示する"])
    assert (
        score.metrics["bleu"] == pytest.approx(100)
        and f"tok:{bleu_tokenizer('ja')}" in score.signatures["bleu"]
    )


def test_samples_are_spread_over_all_lines() -> None:
    lines = [str(index) for index in range(100)]
    score = score_direction(Direction("en", "de"), lines, lines, lines, samples=5)
    assert [sample.source for sample in score.samples] == ["0", "20", "40", "60", "80"]
    assert (
        len(score_direction(Direction("en", "de"), lines[:2], lines[:2], lines[:2], samples=5).samples) == 2
    )


def test_wrong_numbers_of_lines() -> None:
    with pytest.raises(ValueError, match="3 sources, 2 hypotheses and 3 references"):
        score_direction(Direction("en", "de"), SOURCES, HYPOTHESES[:2], REFERENCES)
    with pytest.raises(UserError, match="no sentences to score"):
        score_direction(Direction("en", "de"), [], [], [])


def table() -> ScoreTable:
    directions = (
        fake("de-en", 40, 10),
        fake("fr-en", 20, 20),
        fake("en-de", 30, 12),
        fake("de-fr", 8, 2, sentences=30, weak=0.9),
    )
    return ScoreTable("demo", 100, "test", 5, 1.0, directions, {"de-en": "high", "en-fr": "low"})


def test_averages_by_hand() -> None:
    found = table().averages()
    assert list(found) == ["into_english", "out_of_english", "between_others", "all", "high", "low"]
    assert (
        found["into_english"].directions,
        found["into_english"].metrics["chrf"],
        found["into_english"].copy["chrf"],
    ) == (2, 30, 15)
    assert found["out_of_english"].metrics == translated(15, 30, 31)
    assert found["between_others"].metrics["chrf"] == 8
    assert (
        found["all"].metrics["chrf"] == (40 + 20 + 30 + 8) / 4
    )  # each direction once, whatever its number of sentences
    assert found["high"].metrics["chrf"] == 35 and found["low"].metrics["chrf"] == 20
    assert table().share("weak") == pytest.approx((3 * 10 * 0.5 + 30 * 0.9) / 60)


def test_classes_of_source_and_target_where_not_all_directions_touch_english() -> None:
    groups = {"en": "high", "de": "high", "oc": "very_low"}
    scores = tuple(
        fake(name, chrf) for name, chrf in (("de-en", 40), ("en-de", 30), ("de-oc", 8), ("oc-en", 6))
    )
    whole = ScoreTable("demo", 100, "test", 5, 1.0, scores, groups=groups)
    found = {name: average for name, average in whole.averages().items() if "2" in name}
    assert {name: (each.directions, each.metrics["chrf"]) for name, each in found.items()} == {
        "H2H": (2, 35),
        "H2V": (1, 8),
        "V2H": (1, 6),
    }
    english = ScoreTable("demo", 100, "test", 5, 1.0, (*scores[:2], scores[3]), groups=groups)
    assert not [name for name in english.averages() if "2" in name]
    assert ScoreTable.from_json(whole.to_json()) == whole
    assert json.loads(whole.to_json())["averages"]["H2V"]["chrf"] == 8
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(whole.render())
    assert "H2V: high into very low" in console.export_text()


def test_resource_groups_by_training_pairs() -> None:
    pairs = {"de-en": 1000, "en-fr": 999, "en-nl": 99}
    assert resource_groups(pairs, Groups(high=1000, medium=100)) == {
        "de-en": "high",
        "en-fr": "medium",
        "en-nl": "low",
    }


def test_json_round_trip() -> None:
    real = score_direction(Direction("en", "de"), SOURCES, HYPOTHESES, REFERENCES)
    before = ScoreTable("demo", 100, "test", 5, 0.6, (real, fake("fr-en", 20)), {"de-en": "high"})
    after = ScoreTable.from_json(before.to_json())
    assert after == before and after.averages() == before.averages()
    value = json.loads(before.to_json())
    assert value["averages"]["all"]["chrf"] == before.averages()["all"].metrics["chrf"]
    assert value["directions"]["en-de"]["copy"]["bleu"] == real.copy["bleu"]
    assert value["signatures"]["bleu"] == [real.signatures["bleu"], "b"]


def test_file_is_replaced_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    table().write(path)
    before = path.read_bytes()
    assert ScoreTable.read(path) == table()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        table().write(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"name": "a"}',
        table().to_json().replace('"step": 100', '"step": "x"'),
        table().to_json().replace("de-en", "de"),
    ],
)
def test_damaged_scores_are_refused(text: str, tmp_path) -> None:
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json"):
        ScoreTable.read(tmp_path / "scores.json")


def test_absent_scores_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="lsmoe evaluate"):
        ScoreTable.read(tmp_path / "scores.json")


def test_table_shows_every_direction_and_average() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table().render())
    text = console.export_text()
    for expected in (
        "de-en",
        "de-fr",
        "40.0 (10.0)",
        "into English",
        "30.0 (15.0)",
        "between others",
        "high resource",
    ):
        assert expected in text
