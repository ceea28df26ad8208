"""Comparisons of systems: sacrebleu's own tests by direction, the mean over directions by hand, and what does
not compare.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from typer.testing import CliRunner

from lsmoe_ds.cli import app
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.compare import compare_runs
from lsmoe_ds.evaluation.compare_page import check_place, write_page
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.metrics import make_metrics
from lsmoe_ds.evaluation.score_folder import ScoreFolder
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.evaluation.significance import Trials, interval, run_trials

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
EN_DE, DE_EN, EN_FR = (Direction(*text.split("-")) for text in ("en-de", "de-en", "en-fr"))


def sentences(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(4, 12))) for _ in range(count)]


def translate(references: list[str], errors: float, seed: int) -> list[str]:
    """Replace a share ``errors`` of the words with random ones and return the lines."""
    chance = random.Random(seed)
    return [
        " ".join(chance.choice(WORDS) if chance.random() < errors else word for word in line.split())
        for line in references
    ]


def write_system(
    home: Path, errors: float, directions: tuple[Direction, ...] = (EN_DE, DE_EN, EN_FR), **question: object
) -> Path:
    """Write what an evaluation leaves of a system that gets a share ``errors`` of the words wrong.

    Return the folder, ``home``.
    """
    folder, scores = ScoreFolder(home), []
    table = replace(ScoreTable(home.name, 100, "test", 5, 1.0, ()), **question)
    folder.check()
    folder.make(table.question)
    for number, direction in enumerate(directions):
        references = sentences(number, 40 + number)
        hypotheses = translate(references, errors, seed=len(home.name))
        folder.write_text(table.question, direction, references[::-1], hypotheses, references)
        scores.append(score_direction(direction, references[::-1], hypotheses, references))
    folder.write(replace(table, directions=tuple(scores)), directions)
    return home


def test_trials_are_sacrebleus() -> None:
    references = sentences(1, 60)
    systems = [translate(references, errors, seed) for seed, errors in enumerate((0.3, 0.2, 0.35))]
    found, signatures = run_trials(systems, references, make_metrics("de"), 100, 7)
    metrics = {"BLEU": BLEU(), "chrF": CHRF(), "chrF++": CHRF(word_order=2)}
    named = [(str(number), lines) for number, lines in enumerate(systems)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SACREBLEU_SEED", "7")
        for kind, samples in (("bs", 100), ("ar", 1000)):
            signed, theirs = PairedTest(named, metrics, [references], test_type=kind, n_samples=samples)()
            for (name, ours), result, signature in zip(
                found.items(), list(theirs.values())[1:], signed.values(), strict=True
            ):
                outcomes = [ours[0].baseline(), *(trials.outcome() for trials in ours)]
                assert [outcome.score for outcome in outcomes] == [each.score for each in result]
                p_values = [o.p_bootstrap if kind == "bs" else o.p_randomization for o in outcomes[1:]]
                assert p_values == [each.p_value for each in result[1:]]
                if kind == "bs":
                    assert [o.mean for o in outcomes] == pytest.approx(
                        [each.mean for each in result], rel=1e-6
                    )
                    assert [o.ci for o in outcomes] == pytest.approx([each.ci for each in result], rel=1e-6)
                    assert signatures[name] == f"{signature}|ar:1000" and "seed:7" in signatures[name]
    assert (
        found["bleu"][0].outcome().differs
        and found["bleu"][0].outcome().difference > 0 > found["bleu"][1].outcome().difference
    )


def test_the_mean_over_directions_by_hand() -> None:
    def trials(
        scores: list[float],
        baseline: list[float],
        system: list[float],
        ours: list[float],
        theirs: list[float],
    ) -> Trials:
        return Trials(np.array(scores), np.array([baseline, system]), np.array([ours, theirs]))

    first = trials([10, 14], [9, 10, 11, 12], [13, 14, 15, 16], [12, 13, 11, 10], [12, 11, 13, 14])
    second = trials([20, 18], [19, 20, 21, 20], [18, 18, 19, 17], [19, 18, 20, 18], [19, 20, 18, 20])
    mean = Trials.mean([first, second])
    outcome = mean.outcome()
    assert (mean.baseline().score, outcome.score, outcome.difference) == (15, 16, 1)
    # Differences of the four resamples: (13 + 18 - 9 - 19) / 2 and so on.
    assert (
        (outcome.low, outcome.high) == (0.5, 1.5) and outcome.mean == 16.25 and outcome.ci == (17 - 15.5) / 2
    )
    # Less their mean, 1.125, none exceeds 1; of the randomizations' (0, 0, 0, -3) / 1 one does.
    assert outcome.p_bootstrap == 1 / 5
    assert outcome.p_randomization == 2 / 5
    assert interval(np.arange(1000.0)) == (25, 974)
    for p_bootstrap, p_randomization, differs in (
        (0.04, 0.04, True),
        (0.04, 0.06, False),
        (0.06, 0.04, False),
    ):
        assert replace(outcome, p_bootstrap=p_bootstrap, p_randomization=p_randomization).differs == differs


def test_systems_of_different_quality(tmp_path, capsys) -> None:
    runs = [
        write_system(tmp_path / name, errors)
        for name, errors in (("base", 0.3), ("better", 0.05), ("same", 0.3))
    ]
    comparison = compare_runs(runs, samples=100, progress=False)
    write_page(comparison, tmp_path / "page.html")
    assert list(comparison.directions) == [EN_DE, DE_EN, EN_FR]
    for metric, outcomes in comparison.mean.items():
        by_direction = [found[metric] for found in comparison.directions.values()]
        for index, outcome in enumerate(outcomes):
            assert outcome.score == pytest.approx(sum(found[index].score for found in by_direction) / 3)
        assert (
            outcomes[1].differs
            and outcomes[1].difference > 0
            and outcomes[1].low > 0
            and outcomes[0].difference is None
        )
        assert outcomes[1].high - outcomes[1].low < max(
            found[1].high - found[1].low for found in by_direction
        )
    value = comparison.to_dict()
    json.dumps(value, allow_nan=False)
    assert (
        value["seed"] == 12345
        and value["randomization_trials"] == 1000
        and value["systems"][0]["name"] == "base"
    )
    assert value["directions"]["en-de"]["chrf"][1]["difference"] > 0 and len(value["mean"]["bleu"]) == 3
    assert compare_runs(runs, samples=100, progress=False).to_dict() == value
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page and page.count('class="point"') == 3 * 4 * 2 and "mean of 3 directions" in page
    same = compare_runs([runs[0], runs[0]], samples=100, progress=False)
    assert (
        same.mean["bleu"][1].difference == 0
        and same.mean["bleu"][1].p_randomization == 1
        and not same.mean["bleu"][1].differs
    )
    shown = CliRunner().invoke(
        app, ["compare", str(runs[0]), str(runs[1]), "--directions", "en-de", "--samples", "100"]
    )
    assert (
        shown.exit_code == 0
        and "mean of" not in shown.stdout
        and re.search(r"\+\d+\.\d\d \[\+\d", shown.stdout)
    )
    value = json.loads(
        CliRunner()
        .invoke(app, ["compare", *map(str, runs[:2]), "--samples", "100", "--seed", "3", "--json"])
        .stdout
    )
    assert value["seed"] == 3 and "seed:3" in value["signatures"]["bleu"][0]


def test_systems_that_were_asked_something_else_are_refused(tmp_path) -> None:
    base = write_system(tmp_path / "base", 0.3)
    for name, question, message in (
        ("limited", {"limit": 3}, "limit is none in the first and 3 in the second"),
        ("shared", {"route": "shared"}, "route is specific in the first and shared in the second"),
        ("words", {"tokenize": "char"}, "tokenize is none in the first and char in the second"),
    ):
        other = write_system(tmp_path / name, 0.2, **question)
        with pytest.raises(UserError, match=f"were not asked the same question: {message}"):
            compare_runs([base, other], samples=100, progress=False)
    # A record that is named may differ in its search, not in its text; the words of BLEU can be chosen anew.
    (shared,) = (tmp_path / "shared" / "scores").glob("*.json")
    assert compare_runs([base, shared], ["en-de"], samples=100, progress=False).mean["bleu"][1].difference
    assert (
        compare_runs([base, shared.with_suffix("")], ["en-de"], samples=100, progress=False)
        .systems[1]
        .table.route
        == "shared"
    )
    assert compare_runs([base, tmp_path / "words"], ["en-de"], "char", 100, progress=False)
    (limited,) = (tmp_path / "limited" / "scores").glob("*.json")
    with pytest.raises(UserError, match="limit is none"):
        compare_runs([base, limited], samples=100, progress=False)
    fewer = write_system(tmp_path / "fewer", 0.2, (EN_DE, EN_FR))
    for pair in ([base, fewer], [fewer, base]):
        with pytest.raises(
            UserError, match="fewer has no scores of de-en: name directions that all have with --directions"
        ):
            compare_runs(pair, samples=100, progress=False)
    changed = write_system(tmp_path / "changed", 0.2)
    path = ScoreFolder(changed).text("step-100.test.beam-5", DE_EN, "reference")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "other", *lines[5:]]) + "\n")
    with pytest.raises(
        UserError,
        match=r"the references of de-en in .*base and .*changed differ, first in line 5 \(of 41 and 41\)",
    ):
        compare_runs([base, changed], samples=100, progress=False)
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="is damaged: de-en has 41 source, 41 hypothesis, 40 reference lines"):
        compare_runs([base, changed], samples=100, progress=False)
    path.unlink()
    with pytest.raises(UserError, match=r"there is no text .*de-en\.reference"):
        compare_runs([base, changed], samples=100, progress=False)


def test_scores_of_different_steps_are_compared_and_said(tmp_path, capsys) -> None:
    runs = [write_system(tmp_path / "base", 0.3), write_system(tmp_path / "older", 0.3, step=20)]
    compare_runs(runs, ["en-de"], samples=100, progress=False)
    assert (
        f"lsmoe: the scores are of different steps: {runs[0]} of step 100, {runs[1]} of step 20\n"
        == capsys.readouterr().err
    )
    records = [next((run / "scores").glob("*.json")) for run in runs]
    compare_runs(records, ["en-de"], samples=100, progress=False)
    compare_runs(runs[:1] * 2, ["en-de"], samples=100, progress=False)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_compared(tmp_path, monkeypatch) -> None:
    base = write_system(tmp_path / "base", 0.3)
    spm = write_system(tmp_path / "spm", 0.3, tokenize="spm-0123456789ab")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([base], "name two runs or more"),
        ([base, tmp_path / "empty"], "there are no scores of .*empty: `lsmoe evaluate .*empty` writes them"),
        ([base, tmp_path / "none"], "there are no scores of .*none"),
        (
            [spm, spm],
            r"made with the sentencepiece model spm-0123456789ab: give that file with --tokenize spm:FILE",
        ),
    ):
        with pytest.raises(UserError, match=message):
            compare_runs(paths, samples=100, progress=False)
    refused = CliRunner().invoke(app, ["compare", str(base), str(base), "--directions", ""])
    assert "--directions names no direction" in str(refused.exception) and isinstance(
        refused.exception, UserError
    )
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another file with --out"):
        check_place(tmp_path / "nowhere" / "page.html")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    with pytest.raises(
        UserError, match=r"100 resamples of 42 lines need .* GiB of memory, 0\.0 are free: take --samples 100"
    ):
        compare_runs([base, base], samples=100, progress=False)
