"""Compare the members of a study: gains over the baseline, and whether all seeds agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
    means = _by_direction(against.values())
    by_direction = {key: _by_direction(scores.get(key, {}).values()) for key in titles}
    scored = {direction for directions in by_direction.values() for direction in directions}
    rows = []
    for key, title in titles.items():
        tables, directions = dict(sorted(scores.get(key, {}).items())), by_direction[key]
        gains = {d: score[main].mean - means[d][main].mean for d, score in directions.items() if d in means}
        ratio = sum(gain > 0 for gain in gains.values()) / len(gains) if gains and key != baseline else None
        # A member with models for some directions is compared in these alone.
        own = {seed: _mean(table, gains, main) for seed, table in tables.items()} if gains else {}
        reference = Spread.of(_mean(table, gains, main) for table in against.values()) if gains else None
        spread = Spread.of(own.values())
        gain, by_seed, beyond = None, dict[int, float](), None
        if spread is not None and reference is not None:
            gain = spread.mean - reference.mean
            by_seed = {seed: mean - reference.mean for seed, mean in own.items()}
            beyond = None if key == baseline else _apart(spread, reference)
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
    gains_of = {(row.member, row.route): row.gain_by_seed for row in rows if not row.is_baseline}
    for number, row in enumerate(rows):
        taught = gains_of.get((teachers or {}).get(row.member, ("", "")), {})
        both = row.gain_by_seed.keys() & taught.keys()
        if (whole := sum(taught[seed] for seed in both)) > 0:
            rows[number] = replace(row, kept_of_teacher=sum(row.gain_by_seed[seed] for seed in both) / whole)
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


def _apart(one: Spread, other: Spread) -> bool | None:
    """Tell whether all seeds of one score above, or all below, every seed of the other.

    None if either has fewer than two seeds.
    """
    if min(one.seeds, other.seeds) < 2:
        return None
    return one.smallest > other.largest or one.largest < other.smallest


def _mean(table: ScoreTable, directions: Iterable[str], metric: str) -> float:
    """Return the mean score of a table over some of its directions."""
    found = {str(score.direction): score.metrics[metric] for score in table.directions}
    return statistics.fmean(found[direction] for direction in directions)


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
