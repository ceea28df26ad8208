"""The tables of a study against numbers by hand, as text, Markdown, JSON and a page."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from support import PROJECT
from support.pages import HOSTILE, Page

from lsmoe_ds.directions import Direction
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.study.comparing import compare
from lsmoe_ds.study.page import draw_picture, render_page
from lsmoe_ds.study.table import Comparison, Costs, Row, Spread

SIGNATURES = {"bleu": "b", "chrf": "c", "chrfpp": "p"}
RESOURCES = {"de-en": "high", "en-fr": "low"}
NAIVE, LMS, SHARED = ("naive", "specific"), ("lms", "specific"), ("lms", "shared")
TITLES = {NAIVE: "Naive | MMT", LMS: HOSTILE, SHARED: "LMS, shared"}


def scored(**chrfpp: float) -> ScoreTable:
    """Invented scores by direction (``en_de=20``): BLEU is half of chrF++, chrF one more, copying scores 10,
    11 and 12.
    """
    directions = tuple(
        DirectionScore(
            Direction(*name.split("_")),
            Metrics({"bleu": value / 2, "chrf": value + 1, "chrfpp": value}),
            Metrics({"bleu": 10, "chrf": 11, "chrfpp": 12}),
            7,
            0.0,
            0.0,
            1.0,
            SIGNATURES,
            (),
        )
        for name, value in chrfpp.items()
    )
    return ScoreTable("small", 30, "test", 5, 1.0, directions, RESOURCES)


SCORES = {
    NAIVE: {
        1: scored(en_de=20, de_en=30, en_fr=10, fr_en=20),
        2: scored(en_de=22, de_en=30, en_fr=14, fr_en=24),
    },
    #   means: 21, 30, 12, 22; of all: 20 and 22.5, 21.25
    LMS: {
        2: scored(en_de=26, de_en=30, en_fr=12, fr_en=28),
        1: scored(en_de=24, de_en=32, en_fr=8, fr_en=24),
    },
    #   means: 25, 31, 10, 26; of all: 24 and 22, 23; better than the baseline in 3 of 4
}


def comparison_of(scores, titles=TITLES):
    spread = Spread.of([1000.0, 1200.0])
    costs = {key: Costs(7_000_000, 6_000_000, 5_000_000, spread, spread) for key in titles}
    evaluate = {"beam": 5, "length_penalty": 1.0, "split": "test", "limit": None}
    return compare("small", 30, [1, 2], evaluate, NAIVE, titles, costs, scores)


def test_means_spreads_gains_and_win_ratio():
    naive, lms, shared = comparison_of(SCORES).rows
    assert lms.groups["all"]["chrfpp"] == Spread(23.0, 22.0, 24.0, 2)
    assert lms.groups["all"]["bleu"] == Spread(11.5, 11.0, 12.0, 2)
    assert lms.groups["all"]["chrf"] == Spread(24.0, 23.0, 25.0, 2)
    assert lms.groups["into_english"]["chrfpp"] == Spread(28.5, 28.0, 29.0, 2)
    assert lms.groups["out_of_english"]["chrfpp"] == Spread(17.5, 16.0, 19.0, 2)
    assert (
        lms.groups["high"]["chrfpp"].mean == 28.0
        and lms.groups["low"]["chrfpp"].mean == 18.0
        and "medium" not in lms.groups
    )
    assert lms.directions["en-fr"]["chrfpp"] == Spread(10.0, 8.0, 12.0, 2)
    assert lms.gain == pytest.approx(1.75) and lms.gain_by_seed == {
        1: pytest.approx(0.75),
        2: pytest.approx(2.75),
    }
    assert lms.gain_by_direction == {"en-de": 4.0, "de-en": 1.0, "en-fr": -2.0, "fr-en": 4.0}
    assert lms.win_ratio == 0.75 and lms.seeds == (1, 2)
    assert naive.win_ratio is None and naive.gain_by_seed == {1: -1.25, 2: 1.25}
    assert shared.win_ratio is None and shared.gain is None and shared.groups == {} and shared.seeds == ()


def test_a_member_with_some_directions_is_compared_in_these():
    some = {1: scored(en_de=26, de_en=31), 2: scored(en_de=28, de_en=31)}
    found = comparison_of({**SCORES, SHARED: some})
    naive, lms, shared = found.rows
    # The baseline's seeds have 25 and 26 in these two directions.
    assert shared.gain == 3.5 and shared.gain_by_seed == {1: 3.0, 2: 4.0} and shared.beyond_seeds is True
    assert shared.win_ratio == 1.0 and (naive.gain, lms.gain) == (0.0, 1.75)
    assert (naive.title, shared.title) == (TITLES[NAIVE], "LMS, shared (2 of 4 directions)")
    few = replace(shared, costs=replace(shared.costs, serving_one=1_000_000))
    picture = draw_picture(replace(found, rows=(naive, replace(lms, costs=few.costs), few)))
    assert picture is not None and "Naive" in picture and "LMS, shared" not in picture


def test_how_much_of_its_teachers_gain_a_student_keeps():
    tables = {
        NAIVE: SCORES[NAIVE],
        LMS: SCORES[LMS],
        SHARED: {2: scored(en_de=22, de_en=31, en_fr=16, fr_en=24)},
    }

    def compared(tables):
        teachers = {"lms": NAIVE, "x": LMS}
        titles = {NAIVE: "Naive", LMS: "LMS", ("x", "specific"): "Student"}
        costs = dict.fromkeys(titles, Costs(1, 1, 1))
        scores = {NAIVE: tables[NAIVE], LMS: tables[LMS], ("x", "specific"): tables[SHARED]}
        return compare("x", 1, [1, 2], {}, NAIVE, titles, costs, scores, teachers=teachers)

    found = compared(tables)
    # With seed 2, which both have, the baseline scores 22.5, the student 23.25 and its teacher 24.
    assert found.rows[2].kept_of_teacher == pytest.approx(0.75 / 1.5)
    assert found.rows[2].gain == found.rows[2].gain_by_seed[2] == 0.75, "of the same seed"
    assert found.rows[2].gain_by_direction == {"en-de": 0, "de-en": 1, "en-fr": 2, "fr-en": 0}
    assert found.rows[1].kept_of_teacher is None, "the baseline has no gain to keep"
    grid = next(grid for grid in found.grids() if grid.title == "chrF++")
    assert grid.columns[-1] == "Kept of its teacher's gain"
    assert [row[-1] for row in grid.rows] == ["–", "–", "50%", "–"]
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    worse = compared(tables | {LMS: {2: scored(en_de=1, de_en=2, en_fr=3, fr_en=4)}})
    assert worse.rows[2].kept_of_teacher is None, "nor has a teacher that is worse"
    assert all("Kept" not in column for grid in worse.grids() for column in grid.columns)


def test_an_upper_bound_is_called_so():
    found = comparison_of(SCORES)
    first, second = found.rows[:2]
    bound = replace(second, costs=replace(second.costs, serving_at_most=True))
    found = replace(found, rows=(first, bound))
    assert [row[3] for row in found.grids()[0].rows] == ["5.00M", "at most 5.00M"]
    again = Comparison.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.rows[1].costs.serving_at_most and not again.rows[0].costs.serving_at_most
    old = found.to_dict()["rows"][0]
    del old["costs"]["serving_at_most"]  # as stored before
    assert Row.from_dict(json.loads(json.dumps(old))).costs == first.costs


def test_whether_a_difference_is_larger_than_what_seeds_do():
    """Of the means of all directions the baseline has 20 and 22.5."""
    high, low = (
        scored(en_de=24, de_en=33, en_fr=13, fr_en=22),
        scored(en_de=23, de_en=31, en_fr=12, fr_en=25),
    )  # 23 and 22.75
    naive, above, below, between, one = comparison_of(
        {
            NAIVE: SCORES[NAIVE],
            LMS: {1: high, 2: low},
            SHARED: {1: scored(en_de=1, de_en=2), 2: scored(en_de=3, de_en=4)},
            ("x", "specific"): SCORES[LMS],  # 24 and 22
            ("y", "specific"): {1: high},
        },
        {**TITLES, ("x", "specific"): "X", ("y", "specific"): "Y"},
    ).rows
    assert [row.beyond_seeds for row in (naive, above, below, between, one)] == [
        None,
        True,
        True,
        False,
        None,
    ]
    assert [row.certainty for row in (naive, above, between, one)] == [
        "",
        "beyond seed noise",
        "within seed noise",
        "too few seeds",
    ]
    comparison = compare(
        "x", 1, [1], {"beam": 5}, NAIVE, {NAIVE: "N"}, {NAIVE: Costs(1, 1, 1)}, {NAIVE: {1: high}}
    )
    assert (
        comparison.about_seeds()
        == "With one seed it is unknown how much of a difference, or of a win ratio, is chance: add seeds."
    )


def test_a_table_by_classes_of_source_and_target():
    groups = {"en": "high", "de": "high", "fr": "low"}
    tables = {1: replace(scored(de_fr=20, fr_de=30, en_de=40), groups=groups)}
    found = comparison_of({NAIVE: tables})
    grid = next(grid for grid in found.grids() if grid.title == "chrF++ by source and target")
    assert grid.columns == ["Model", "H2H", "H2L", "L2H"]
    assert grid.rows[0] == ["Naive | MMT", "40.0", "20.0", "30.0"]
    assert grid.rows[-1] == ["Copying the source", "12.0", "12.0", "12.0"]
    assert not [grid for grid in comparison_of(SCORES).grids() if "by source" in grid.title]


def test_a_comparison_is_read_back():
    comparison = comparison_of(SCORES)
    assert Comparison.from_dict(json.loads(json.dumps(comparison.to_dict()))) == comparison


def test_the_result_that_comes_with_the_project_is_told_alike_everywhere():
    """studies/results: the table in Markdown, and the page of the documentation, say what the figures say."""
    folder = PROJECT / "studies" / "results"
    for name in ("init_std", "lms"):
        comparison = Comparison.from_dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        assert (folder / f"{name}.md").read_text(encoding="utf-8") == comparison.to_markdown()
    page, rows = (
        (PROJECT / "docs" / "study.md").read_text(encoding="utf-8"),
        {row.title: row for row in comparison.rows},
    )
    told = {
        "LMS, pair-wise": "LMS, pair-wise, rank 32",
        "CLSR*": "CLSR*",
        "Switch, 5 experts": "Switch, 5 experts",
    }
    for title, name in told.items():
        row = rows[title]
        (line,) = re.findall(rf"^\| {re.escape(name)} \|.*$", page, re.M)
        assert (
            f"{row.groups['all']['chrfpp'].text()} | {row.gain:+.1f} | {row.win_ratio:.0%} | "
            f"{row.certainty} |" in line
        ), line


def test_equal_scores_are_no_win():
    twice = comparison_of({NAIVE: SCORES[NAIVE], LMS: SCORES[NAIVE]})
    assert twice.rows[1].win_ratio == 0.0


def test_spread_as_text():
    assert Spread.of([]) is None
    one, two = Spread.of([1234.56]), Spread.of([10.0, 13.0])
    assert one is not None and one.text() == "1,234.6" and one.text(",.0f") == "1,235"
    assert two is not None and two.text() == "11.5 ±1.5"


def test_tables_in_markdown_json_and_html(tmp_path):
    comparison = comparison_of(SCORES)
    grids = {grid.title: grid for grid in comparison.grids()}
    rows = {row[0]: row[1:] for row in grids["chrF++"].rows}
    assert grids["chrF++"].columns[1:] == [
        "Into English",
        "Out of English",
        "All directions",
        "High resource",
        "Low resource",
        "Win ratio",
        "Difference",
    ]
    assert rows[HOSTILE] == [
        "28.5 ±0.5",
        "17.5 ±1.5",
        "23.0 ±1.0",
        "28.0 ±0.0",
        "18.0 ±2.0",
        "75%",
        "within seed noise",
    ]
    assert rows["LMS, shared"] == ["missing"] * 6 + ["–"] and rows["Copying the source"] == ["12.0"] * 5 + [
        "–",
        "–",
    ]
    assert rows["Naive | MMT"][-1] == "–"
    assert grids["Size and speed"].rows[1][1:] == [
        "7.00M",
        "6.00M",
        "5.00M",
        "1,100 ±100",
        "1,100.0 ±100.0",
        "2 of 2",
    ]
    assert grids["chrF++ by direction"].rows[1] == ["fr-en", "22.0 ±2.0", "26.0 ±2.0", "missing", "12.0"]
    assert "2 of 6 scores are missing" in comparison.about()
    markdown = comparison.to_markdown()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert "Naive &#124; MMT" in markdown and {line.count("|") for line in lines} == {
        len(grid.columns) + 1 for grid in grids.values()
    }

    value = json.loads(json.dumps(comparison.to_dict()))
    assert value["rows"][1]["win_ratio"] == 0.75 and value["rows"][1]["missing_seeds"] == []
    assert value["rows"][2]["gain"] is None and value["rows"][2]["missing_seeds"] == [1, 2]
    assert value["copy"]["all"] == {"bleu": 10, "chrf": 11, "chrfpp": 12}

    path = tmp_path / "study.html"
    path.write_text(render_page(comparison), encoding="utf-8")
    page = Page(path)
    assert page.needs_nothing_else() and "alert('x')" in page.text
    dots = [dict(attributes) for tag, attributes in page.tags if tag == "i" and "title" in attributes]
    assert [dot["title"] for dot in dots] == ["seed 1: -1.2", "seed 2: +1.2", "seed 1: +0.8", "seed 2: +2.8"]
    assert (
        "a seed below it" in page.text
        and "range of the seeds of Naive | MMT" in page.text
        and "within seed noise" in page.text
    )
    assert "+4.0" in page.text and "-2.0" in page.text and "missing" in page.text


def test_page_and_tables_without_any_score(tmp_path):
    comparison = comparison_of({})
    path = tmp_path / "study.html"
    path.write_text(render_page(comparison), encoding="utf-8")
    assert "No scores are there yet" in Page(path).text
    assert "| Naive &#124; MMT | missing | – | – |" in comparison.to_markdown()
    assert "missing" not in json.dumps(comparison.to_dict()["copy"]) and comparison.render().row_count == 3
