"""Read a training's metrics, and draw its charts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from lsmoe_ds.analysis.plots import Series, line_chart, smooth
from lsmoe_ds.checkpoint.run_folder import CHRF
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError


@dataclass
class Progress:
    """The content of ``metrics.jsonl``.

    Curves are by step; losses are in nats per target token or label. ``seconds`` and ``tokens`` are totals,
    rates are medians.
    """

    curves: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    tokens_per_second: float | None = None
    mfu: float | None = None  # model FLOPs utilization, from 0 to 1
    tflops_per_rank: float | None = None


def read_progress(path: Path) -> Progress:
    """Read ``metrics.jsonl``. Raises UserError for a damaged line.

    If a resumed training repeated a step, its last line counts. An incomplete last line is ignored.
    """
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
            by_step.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if index < len(lines) - 1:
                raise UserError(
                    f"{path} cannot be read: line {index + 1} is not a JSON object with a 'step'"
                ) from None
    progress = Progress()
    for step, record in sorted(by_step.items()):
        value = {
            key: float(number)
            for key, number in record.items()
            if isinstance(number, int | float) and math.isfinite(number)
        }
        progress.steps = step
        # The training loss includes label smoothing; nll is comparable with the dev loss.
        if "loss" in value:
            value.setdefault("nll", value["loss"])
        for name in value.keys() - {"step"}:
            progress.curves[name].append((step, value[name]))
        progress.seconds += value.get("seconds", 0.0)
        progress.tokens += int(value.get("tokens", 0))
    for rate in ("tokens_per_second", "mfu", "tflops_per_rank"):
        if rate in progress.curves:
            setattr(progress, rate, median(value for _, value in progress.curves[rate]))
    return progress


@dataclass(frozen=True)
class TrainingCharts:
    """The charts of a training's curves."""

    loss: Markup | None
    both_routes: bool  # whether dev losses of the shared route are drawn
    low: list[tuple[str, Markup]]  # (title, chart) of the low charts below


def draw_charts(progress: Progress, recipe: Recipe, learned: str) -> TrainingCharts:
    """Draw the losses per ``learned`` (target token, word, ...), and below them the charts of the methods."""
    curve = progress.curves
    loss, dev, shared = curve["nll"], curve["dev_loss"], curve["dev_loss_shared"]
    series = [Series(loss, "faint"), Series(smooth(loss, max(3, len(loss) // 50)))] if loss else []
    # The two routes often have the same losses, so the curve drawn first is wider and stays visible behind
    # the other.
    series += [Series(dev, "dev wide" if shared else "dev")] if dev else []
    series += [Series(shared, "shared")] if shared else []
    low = [
        ("chrF of dev translations", [Series(curve[CHRF], "dev")]),
        ("Learning rate", [Series(curve["learning_rate"])]),
    ]
    if curve["mfu"]:
        low.append(("Model FLOPs utilization", [Series(curve["mfu"])]))
    else:
        low.append(("TFLOP/s of a rank", [Series(curve["tflops_per_rank"])]))
    if recipe.model.distills:
        low.append((f"Divergence of the two routes, in nats a {learned}", [Series(curve["distillation"])]))
    for chart in (chart for method in recipe.model.methods for chart in method.charts()):
        aim = [] if chart.aim is None else [Series([(0, chart.aim), (progress.steps, chart.aim)], "aim")]
        low.append((chart.title, [*aim, Series(curve[chart.metric])]))
    return TrainingCharts(
        line_chart(series, f"Loss over {progress.steps:,} steps") if series else None,
        bool(shared),
        [
            (about, line_chart(drawn, f"{about}, over the steps", tall=False))
            for about, drawn in low
            if drawn[-1].points
        ],
    )
