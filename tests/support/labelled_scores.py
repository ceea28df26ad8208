"""Invented scores of tasks that do not translate."""

from __future__ import annotations

from lsmoe_ds.directions import Direction
from lsmoe_ds.evaluation.direction_scores import DirectionScore, Sample
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.scores import ScoreTable

GROUPS = {"de": "high", "en": "high", "oc": "low"}


def tagged(**f1: float) -> ScoreTable:
    """Return scores by language (``de=80``): the precision is one more than F1, the recall one less."""
    scores = tuple(
        DirectionScore(
            task="tag",
            direction=Direction(code, code),
            metrics=Metrics({"f1": value, "precision": value + 1, "recall": value - 1}),
            copy=None,
            sentences=7,
            exact=0.0,
            weak=0.0,
            seconds=1.0,
            signatures={},
            samples=(Sample("Anna lebt .", "B-PER O O", "B-PER O O"),),
        )
        for code, value in f1.items()
    )
    return ScoreTable("names", 100, "test", directions=scores, groups=GROUPS, task="tag")
