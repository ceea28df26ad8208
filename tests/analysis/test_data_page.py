"""The page of prepared data, and the tables beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from support.small_corpora import pairs, recipe
from typer.testing import CliRunner

from lsmoe_ds.analysis.prepared import EDGES, write_page
from lsmoe_ds.cli import app
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

ZERO_SHOT = "de-fr"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Prepare data with pairs that cleaning drops and a zero-shot direction, and return the recipe."""
    root = tmp_path_factory.mktemp("page")
    lines = ["en\tde\tfr"]
    for number, (english, german) in enumerate(pairs("en", "de", 90)):
        lines.append(f"{english}\t{german}\t{pairs('en', 'fr', 90)[number][1] if number < 60 else ''}")
    lines += [*lines[1:11], "Short\tKurz\t", "Same words as here\tSame words as here\t"]
    (root / "x.tsv").write_text("\n".join(lines) + "\n")
    made = recipe(
        root,
        corpora=[{"path": str(root / "x.tsv"), "format": "tsv"}],
        languages=[],
        directions=["en-de", "de-en", "en-fr", "de-fr"],
        train_on=None,
    )
    prepare(made)
    return made


def test_the_tables_are_those_of_the_data(settings, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    summary = write_page(settings, tmp_path / "out")
    data = PreparedData.of(settings)
    with (tmp_path / "out/cleaning.csv").open() as file:
        rows = {row["bitext"]: row for row in csv.DictReader(file)}
    for bitext, row in rows.items():
        found = data.manifest["cleaning"][bitext]
        assert {key: int(value) for key, value in row.items() if key != "bitext" and value != "0"} == {
            key: value for key, value in found.items() if value
        }
    assert int(rows["de-en"]["duplicate"]) >= 10 and int(rows["de-en"]["copy"]) == 1
    grids = {grid["name"]: grid for grid in json.loads((tmp_path / "out/data.json").read_text())["grids"]}
    lengths = np.concatenate(
        [
            data.tokens(direction, "train").source.lengths[:]
            for direction in data.languages.directions
            if direction.source == "en"
        ]
    )
    wanted, start = {}, 0
    for end in (*EDGES, 10**9):
        name = f"{start + 1}-{end}" if end < 10**9 else f"over {EDGES[-1]}"
        wanted[name], start = float(((lengths > start) & (lengths <= end)).mean()), end
    english = dict(zip(grids["lengths"]["columns"], grids["lengths"]["values"][0], strict=True))
    assert grids["lengths"]["rows"][0] == "English"
    assert english == pytest.approx({name: wanted[name] for name in english})
    assert sum(english.values()) == pytest.approx(1)
    page = (tmp_path / "out/index.html").read_text()
    for row in summary.rows:
        assert f">{Direction.parse(row.direction).label}</td>" in page
    assert all(notice.split("'")[0] in page for notice in summary.notices)
    assert page.count("<svg") == 2


def test_the_command_writes_it_and_nothing_else(settings, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "recipe.yaml"
    path.write_text(settings.to_yaml())
    for _ in range(2):  # the second replaces the first
        result = CliRunner().invoke(
            app, ["data", "show", str(path), "--json", "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["vocabulary"] == 120
    files = json.loads((tmp_path / "out/summary.json").read_text())["files"]
    assert {each.name for each in (tmp_path / "out").iterdir()} == {*files, "summary.json"}
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine\.txt, which"):
        write_page(settings, tmp_path / "out")
