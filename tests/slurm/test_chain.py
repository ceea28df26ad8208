"""slurm/submit.sh on a real SLURM, with real trainings: from a recipe to a score table and converted
models.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from small_training import BIN, SLURM

from lsmoe_ds.evaluation.scores import ScoreTable

pytestmark = pytest.mark.slow


def chain(cluster: Cluster, work: Path, *arguments: str) -> dict[str, int]:
    """Job numbers by the names that submit.sh prints."""
    said = cluster.run(SLURM / "submit.sh", "recipe.yaml", *arguments, cwd=work).stdout
    return {name: int(job) for job, name in re.findall(r"^(\d+) +(\S+)", said, re.MULTILINE)}


def without_seconds(path: Path) -> dict:
    scores = json.loads(path.read_text())
    for direction in scores["directions"].values():
        direction.pop("seconds")
    return scores


def test_from_a_recipe_to_scores_and_models(cluster, work, submit):
    jobs = chain(
        cluster,
        work,
        "--set",
        "training.steps=30",
        "--array",
        "8",
        "--convert",
        "en-de",
        "--convert",
        "de-en:dense",
        "--out",
        "run",
    )
    assert list(jobs) == ["train", "evaluate", "merge", "convert-en-de", "convert-de-en"]
    for name, job in jobs.items():
        assert cluster.wait(job, 240) == "COMPLETED", f"{name}: {cluster.log(job)}"
    table = ScoreTable.read(work / "run/scores.json")
    assert (
        sorted(str(score.direction) for score in table.directions) == ["de-en", "en-de", "en-fr", "fr-en"]
        and table.step == 30
    )
    assert (work / "run/report.html").stat().st_size > 10_000
    merged = without_seconds(work / "run/scores.json")
    subprocess.run([BIN / "lsmoe", "evaluate", "run"], cwd=work, check=True, capture_output=True)
    assert without_seconds(work / "run/scores.json") == merged
    for folder, source, target in (("run-en-de-ctranslate2", "en", "de"), ("run-de-en-dense", "de", "en")):
        command = [BIN / "lsmoe", "translate", folder, "--from", source, "--to", target]
        done = subprocess.run(command, cwd=work, input="a b\n", capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


def test_when_training_fails_the_rest_is_canceled_and_says_why(cluster, work, submit):
    jobs = chain(cluster, work, "--set", "data.vocabulary.size=200", "--out", "failed", "--convert", "en-de")
    train = jobs.pop("train")
    assert cluster.wait(train, 60) == "FAILED"
    for job in jobs.values():
        assert cluster.wait(job, 30) == "CANCELLED"
        assert cluster.show(job)[0]["Reason"] == "DependencyNeverSatisfied"
    assert "'data.vocabulary.size' is 200, but" in cluster.log(train)
