"""Compare the members of a study: gains over the baseline, and whether all seeds agree."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lsmoe_ds.config.host import Task
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.study.table import Comparison, Costs, Row, Scores, Spread


def compare(
    name: str,
    steps: int,
    seeds: Sequence[int],
    evaluate: dict[str, Any],
    baseline: tuple[str, str],
    titles: Mapping[tuple[str, str], str],
    costs: Mapping[tuple[str, str], Costs],
    scores: Mapping[tuple[str, str], Mapping[int, ScoreTable]],
    task: Task = "translate",
    stops_early: bool = False,
    wanted: Mapping[str, Sequence[int]] | None = None,
    teachers: Mapping[str, tuple[str, str]] | None = None,
) -> Comparison:
    """Compare the rows (member, route) of ``titles`` with the row ``baseline``; scores may be missing.

    ``wanted`` has the seeds of each member, by default all; ``teachers`` the rows from which members are
    distilled.
    """
    main, unit = TASKS[task].main, TASKS[task].unit
    against = scores.get(baseline, {})
    by_direction = {key: _by_direction(scores.get(key, {}).values()) for key in titles}
    scored = {direction for directions in by_direction.values() for direction in directions}
    rows = []
    for key, title in titles.items():
        tables, directions = dict(sorted(scores.get(key, {}).items())), by_direction[key]
        # Members with fewer seeds are compared with the same seeds of the baseline, if it has them.
        same = [against[seed] for seed in tables if seed in against]
        reference = _by_direction(same or against.values())
        gains = {
            d: score[main].mean - reference[d][main].mean for d, score in directions.items() if d in reference
        }
        ratio = sum(gain > 0 for gain in gains.values()) / len(gains) if gains and key != baseline else None
        # Those with models for some directions are compared in these alone.
        own, others = (_seed_means(each, gains, main) for each in (tables, against))
        gain, by_seed, beyond = None, dict[int, float](), None
        if own:
            base = statistics.fmean([others[seed] for seed in own if seed in others] or others.values())
            by_seed = {seed: mean - base for seed, mean in own.items()}
            gain = statistics.fmean(by_seed.values())
            beyond = None if key == baseline else _apart(own.values(), others.values())
        some = f" ({len(directions)} of {len(scored)} {unit}s)" if 0 < len(directions) < len(scored) else ""
        rows.append(
            Row(
                *key,
                title + some,
                costs[key],
                tuple(tables),
                _group_scores(tables.values()),
                directions,
                gain,
                by_seed,
                gains,
                ratio,
                beyond,
                key == baseline,
                tuple(seed for seed in (wanted or {}).get(key[0], seeds) if seed not in tables),
            )
        )
    for number, row in enumerate(rows):
        teacher = (teachers or {}).get(row.member)
        if teacher in (None, baseline) or not row.gain_by_direction:
            continue
        three = [scores.get(key, {}) for key in ((row.member, row.route), teacher, baseline)]
        means = (_seed_means(each, row.gain_by_direction, main) for each in three)
        rows[number] = replace(row, kept_of_teacher=_kept_of_gain(*means))
    any_table = next((table for tables in scores.values() for table in tables.values()), None)
    averages = any_table.averages() if any_table else {}
    copy = {group: average.copy for group, average in averages.items() if average.copy is not None}
    of_directions = any_table.directions if any_table else ()
    copied = {str(score.direction): score.copy for score in of_directions if score.copy is not None}
    return Comparison(
        name,
        steps,
        tuple(seeds),
        evaluate,
        titles[baseline],
        tuple(rows),
        copy,
        copied,
        task,
        stops_early,
    )


def _apart(one: Collection[float], other: Collection[float]) -> bool | None:
    """Tell whether all seeds of one score above, or all below, every seed of the other.

    None if either has fewer than two seeds.
    """
    if min(len(one), len(other)) < 2:
        return None
    return min(one) > max(other) or max(one) < min(other)


def _kept_of_gain(
    student: Mapping[int, float], teacher: Mapping[int, float], baseline: Mapping[int, float]
) -> float | None:
    """Return the share of its teacher's gain that a student keeps, over the seeds that all three have.

    None if the teacher gains nothing.
    """
    seeds = student.keys() & teacher.keys() & baseline.keys()
    gain = sum(teacher[seed] - baseline[seed] for seed in seeds)
    return sum(student[seed] - baseline[seed] for seed in seeds) / gain if gain > 0 else None


def _seed_means(
    tables: Mapping[int, ScoreTable], directions: Collection[str], metric: str
) -> dict[int, float]:
    """Return the mean score over some directions by seed; empty if there are no directions."""
    if not directions:
        return {}
    return {
        seed: statistics.fmean(
            score.metrics[metric] for score in table.directions if str(score.direction) in directions
        )
        for seed, table in tables.items()
    }


def _by_direction(tables: Iterable[ScoreTable]) -> dict[str, Scores]:
    return _spreads([{str(score.direction): score.metrics for score in table.directions} for table in tables])


def _group_scores(tables: Iterable[ScoreTable]) -> dict[str, Scores]:
    return _spreads(
        [{group: average.metrics for group, average in table.averages().items()} for table in tables]
    )


def _spreads(found: Sequence[Mapping[str, Metrics]]) -> dict[str, Scores]:
    """Return each key's spread over seeds, for the keys that all seeds have."""
    keys = [key for key in found[0] if all(key in each for each in found)] if found else []
    spreads: dict[str, Scores] = {}
    for key in keys:
        spreads[key] = {}
        for metric in found[0][key].values:
            spread = Spread.of(each[key][metric] for each in found)
            assert spread is not None
            spreads[key][metric] = spread
    return spreads
