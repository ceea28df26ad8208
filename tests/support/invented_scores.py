"""Invent scores of translations."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.directions import Direction
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.evaluation.groups import Metrics


def translated(bleu: float, chrf: float, chrfpp: float) -> Metrics:
    return Metrics({"bleu": bleu, "chrf": chrf, "chrfpp": chrfpp})


def fake(direction: str, chrf: float, copy: float = 1.0, **other) -> DirectionScore:
    values: dict[str, Any] = {
        "sentences": 10,
        "exact": 0.1,
        "weak": 0.5,
        "seconds": 1.0,
        "samples": (),
    } | other
    signatures = {"bleu": "b", "chrf": "c", "chrfpp": "p"}
    return DirectionScore(
        Direction.parse(direction),
        translated(chrf / 2, chrf, chrf + 1),
        translated(0.0, copy, 0.5),
        signatures=signatures,
        **values,
    )
