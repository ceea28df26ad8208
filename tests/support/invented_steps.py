"""Invent steps of a training and their results."""

from __future__ import annotations

from lsmoe_ds.data.batches import Step
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.training.engine import StepResult


def step(tokens: int, source_tokens: int = 5, away: int = 0) -> Step:
    return Step([], tokens, source_tokens, sentences=1, directions=[], away=away)


def result(loss: float, **others: float) -> StepResult:
    given = {"grad_norm": 1.0, "learning_rate": 0.1} | {
        name: others.pop(name) for name in ("grad_norm", "learning_rate") if name in others
    }
    metrics = {"loss": loss, "nll": loss, "balance_loss_weight": 0.0, "gates": 0.0} | others
    return StepResult(metrics, exchanged={"encoder": Traffic(), "decoder": Traffic()}, **given)
