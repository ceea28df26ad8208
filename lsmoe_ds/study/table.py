"""Compare a study's members: means over seeds with their spread, gains over the baseline, win ratios.

A row is a member on one of its routes. A value that was not measured is None here, null in JSON and "missing"
in the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lsmoe_ds.config.host import Task
from lsmoe_ds.directions import Direction, task_order
from lsmoe_ds.evaluation.groups import CLASSES, GROUPS, Metrics
from lsmoe_ds.evaluation.metrics import TASKS, TaskMetrics
from lsmoe_ds.languages import is_english
from lsmoe_ds.notices import counted
from lsmoe_ds.planning.plan import human

MISSING = "missing"
SHORT = {"into_english": "into en", "out_of_english": "out of en", "between_others": "others", "all": "all"}


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, and the smallest and the largest value."""

    mean: float
    smallest: float
    largest: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of values, or None if there are none."""
        found = list(values)
        return cls(sum(found) / len(found), min(found), max(found), len(found)) if found else None

    def text(self, form: str = ",.1f") -> str:
        """Format the mean and, if there are several seeds, half the range: ``31.2 ±0.4``."""
        half = f" ±{format((self.largest - self.smallest) / 2, form)}" if self.seeds > 1 else ""
        return f"{format(self.mean, form)}{half}"


Scores = dict[str, Spread]  # by metric


@dataclass(frozen=True)
class Costs:
    """The costs of a row.

    Parameters are counted as trained, as loaded to serve all directions, and as needed to serve one direction
    after merging or extraction (an upper bound if ``serving_at_most``). The speed is the median of a run's
    records, in tokens per second; ``minutes`` is the training time.
    """

    parameters: int
    serving_all: int
    serving_one: int
    tokens_per_second: Spread | None = None
    minutes: Spread | None = None
    serving_at_most: bool = False


@dataclass(frozen=True)
class Row:
    """The scores of a row over the seeds that exist.

    Gains are in the task's main metric over the baseline's mean of the row's directions and seeds, by seed
    and for each direction.
    ``win_ratio`` is the share of directions, from 0 to 1, whose mean over seeds is above the baseline's.
    ``beyond_seeds`` is true if the gain exceeds the variation between seeds: every seed of the row scores
    above every seed of the baseline, or every seed below. It is None for the baseline itself, and if either
    has fewer than two seeds. ``kept_of_teacher`` is the gain of a student divided by its teacher's, over
    the seeds of both; None if the teacher has none to keep.
    """

    member: str
    route: str
    title: str
    costs: Costs
    seeds: tuple[int, ...]
    groups: dict[str, Scores]
    directions: dict[str, Scores]
    gain: float | None
    gain_by_seed: dict[int, float]
    gain_by_direction: dict[str, float]
    win_ratio: float | None  # None for the baseline itself
    beyond_seeds: bool | None = None
    is_baseline: bool = False
    missing_seeds: tuple[int, ...] = ()
    kept_of_teacher: float | None = None

    @property
    def certainty(self) -> str:
        """Say in a few words whether the gain exceeds seed noise; empty if there is no gain."""
        if self.is_baseline or self.gain is None:
            return ""
        if self.beyond_seeds is None:
            return "too few seeds"
        return "beyond seed noise" if self.beyond_seeds else "within seed noise"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Row:
        """Read a row of :meth:`Comparison.to_dict`."""
        costs = value["costs"] | {
            name: _spread(value["costs"][name]) for name in ("tokens_per_second", "minutes")
        }
        scores = {
            name: {key: _scores_of(each) for key, each in value[name].items()}
            for name in ("groups", "directions")
        }
        by_seed = {int(seed): gain for seed, gain in value["gain_by_seed"].items()}
        seeds = {name: tuple(value[name]) for name in ("seeds", "missing_seeds")}
        read = {"costs": Costs(**costs), "gain_by_seed": by_seed, **scores, **seeds}
        return cls(**{**value, **read})


@dataclass(frozen=True)
class Grid:
    """A table of text cells. The first column is left-aligned."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        lines = [self.columns, ["---", *("---:" for _ in self.columns[1:])], *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{self.about}\n\n{table}\n"


@dataclass(frozen=True)
class Comparison:
    """Everything that a study's tables and page show.

    ``copy`` and ``copy_by_direction`` are the scores of copying the source, empty for tasks other than
    translation.
    """

    name: str
    steps: int
    seeds: tuple[int, ...]
    evaluate: dict[str, Any]
    baseline: str  # title of the row with which gains and win ratios compare
    rows: tuple[Row, ...]
    copy: dict[str, Metrics]
    copy_by_direction: dict[str, Metrics]
    task: Task = "translate"
    stops_early: bool = False  # whether any member may stop before the last of the ``steps``

    @property
    def scoring(self) -> TaskMetrics:
        """Return the task's metrics."""
        return TASKS[self.task]

    @property
    def main(self) -> str:
        """Return the title of the metric for gains and win ratios."""
        return self.scoring.titles[self.scoring.main]

    @property
    def groups(self) -> list[str]:
        """Return the groups that have a direction."""
        return self._of_rows(GROUPS)

    @property
    def classes(self) -> list[str]:
        """Return the classes of source and target that have a direction."""
        return self._of_rows(CLASSES)

    def _of_rows(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if any(name in row.groups for row in self.rows)]

    @property
    def directions(self) -> list[str]:
        """Return the scored directions: into English first; related languages are neighbors."""

        def order(name: str) -> tuple[bool, tuple[str, ...]]:
            direction = Direction.parse(name)
            return direction.alone or not is_english(direction.target), task_order(name)

        return sorted({name for row in self.rows for name in row.directions}, key=order)

    @property
    def runs_missing(self) -> int:
        """Count the scores, over all rows and seeds, that do not exist yet."""
        return sum(len(row.missing_seeds) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``study.json``."""
        return asdict(self) | {
            "score_of_gains": self.scoring.main,
            "copy": {name: metrics.as_dict() for name, metrics in self.copy.items()},
            "copy_by_direction": {name: each.as_dict() for name, each in self.copy_by_direction.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Comparison:
        """Read what :meth:`to_dict` returned."""
        copies = {
            name: {key: Metrics(each) for key, each in value[name].items()}
            for name in ("copy", "copy_by_direction")
        }
        kept = {name: each for name, each in value.items() if name != "score_of_gains"}
        return cls(
            **kept
            | copies
            | {
                "seeds": tuple(value["seeds"]),
                "rows": tuple(Row.from_dict(row) for row in value["rows"]),
            }
        )

    def about(self) -> str:
        """Describe in one line what was trained and evaluated."""
        options = f"{self.evaluate['split']} set"
        options += f", beam {self.evaluate['beam']}" if self.task == "translate" else ""
        if limit := self.evaluate["limit"]:
            options += f", the first {counted(limit, self.scoring.item)} of each {self.scoring.unit}"
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        lacking = self.runs_missing
        wanted = counted(lacking + sum(len(row.seeds) for row in self.rows), "score")
        missing = f" {lacking} of {wanted} {'is' if lacking == 1 else 'are'} missing." if lacking else ""
        steps = f"{'at most ' if self.stops_early else ''}{counted(self.steps, 'step')}"
        return f"{steps} each on the same data, {seeds}; {options}.{missing}"

    def about_seeds(self) -> str:
        """Explain how far gains and win ratios can be trusted."""
        if len(self.seeds) < 2:
            return (
                "With one seed it is unknown how much of a difference, or of a win ratio, is chance: add "
                "seeds."
            )
        return (
            f"A difference is beyond seed noise if each of the {len(self.seeds)} seeds scores above, or each "
            f"below, every seed of {self.baseline}. Within seed noise, the difference and the win ratio may "
            "be chance."
        )

    def grids(self) -> list[Grid]:
        """Return every table, for Markdown and the page."""
        spread = (
            " Means over seeds; ± is half the range from the smallest to the largest."
            if len(self.seeds) > 1
            else ""
        )
        unit = self.scoring.unit
        columns = [
            "Model",
            "Trained",
            f"Served, all {unit}s",
            f"One {unit}",
            "Tokens/s",
            "Minutes",
            "Scores",
        ]
        rows = [
            [row.title, *_costs(row.costs), f"{len(row.seeds)} of {len(self.seeds)}"] for row in self.rows
        ]
        about = (
            f"Parameters that are trained, that are loaded to serve all {unit}s by the row's route, and that "
            f"serve one {unit} once methods are merged into their layers and experts of the task extracted. "
            f"Tokens {'of both sides ' if self.task == 'translate' else ''}a second in training (median of a "
            "run), minutes of training, and how many seeds are scored." + spread
        )
        grids = [Grid("Size and speed", about, columns, rows)]
        for metric in dict.fromkeys([self.scoring.main, *self.scoring.titles]):
            grids.append(self._by_group(metric, spread))
            if self.classes:
                grids.append(self._by_class(metric, spread))
        return [*grids, self._by_direction(spread)] if self.directions else grids

    def _by_group(self, metric: str, spread: str) -> Grid:
        groups, unit = self.groups or ["all"], self.scoring.unit
        titles = [self.scoring.averages[group] for group in groups]
        names = [title[0].upper() + title[1:] for title in titles]
        with_ratio = metric == self.scoring.main
        kept = {
            row.title: f"{row.kept_of_teacher:.0%}" for row in self.rows if row.kept_of_teacher is not None
        }
        columns = ["Win ratio", "Difference", *(["Kept of its teacher's gain"] if kept else [])]
        rows = []
        for row in self.rows:
            cells = [_cell(row.groups.get(group, {}).get(metric)) for group in groups]
            against = [self._ratio(row), row.certainty or "–", kept.get(row.title, "–")][: len(columns)]
            rows.append([row.title, *cells, *(against if with_ratio else [])])
        if self.copy:
            none = ["–"] * len(columns)
            rows.append(["Copying the source", *self._copied(groups, metric), *(none if with_ratio else [])])
        about = f"Means over the {unit}s of a group.{spread}"
        if with_ratio:
            about += (
                f" Win ratio: the share of {unit}s whose mean is above that of {self.baseline}, over the "
                "row's seeds. "
                f"{self.about_seeds()}"
            )
        return Grid(
            self.scoring.titles[metric],
            about,
            ["Model", *names, *(columns if with_ratio else [])],
            rows,
        )

    def _by_class(self, metric: str, spread: str) -> Grid:
        rows = [
            [row.title, *(_cell(row.groups.get(name, {}).get(metric)) for name in self.classes)]
            for row in self.rows
        ]
        rows.append(["Copying the source", *self._copied(self.classes, metric)])
        about = "From high (H), medium (M), low (L) and very low resource (V) languages into such." + spread
        title = f"{self.scoring.titles[metric]} by source and target"
        return Grid(title, about, ["Model", *self.classes], rows)

    def _copied(self, groups: Iterable[str], metric: str) -> list[str]:
        return [f"{self.copy[group][metric]:.1f}" if group in self.copy else MISSING for group in groups]

    def _by_direction(self, spread: str) -> Grid:
        main, unit = self.scoring.main, self.scoring.unit
        rows = []
        for name in self.directions:
            cells = [_cell(row.directions.get(name, {}).get(main)) for row in self.rows]
            if self.copy_by_direction:
                copied = self.copy_by_direction.get(name)
                cells.append(MISSING if copied is None else f"{copied[main]:.1f}")
            rows.append([Direction.parse(name).label, *cells])
        copying = ["Copying"] if self.copy_by_direction else []
        columns = [unit.capitalize(), *(row.title for row in self.rows), *copying]
        return Grid(f"{self.main} by {unit}", spread.strip() or "One seed.", columns, rows)

    def _ratio(self, row: Row) -> str:
        if row.is_baseline:
            return "–"
        return MISSING if row.win_ratio is None else f"{row.win_ratio:.0%}"

    def to_markdown(self) -> str:
        return f"# {self.name}\n\n{self.about()}\n\n" + "\n".join(grid.to_markdown() for grid in self.grids())

    def render(self) -> Any:
        """Return the summary for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(f"{self.name}: {self.about()}"),
            title_justify="left",
            caption=Text(f"win ratio against {self.baseline}. {self.about_seeds()}"),
        )
        groups = [group for group in self.groups if group in SHORT] or ["all"]
        scores = [f"{self.main} {SHORT[group]}" for group in groups]
        second = next(name for name in self.scoring.titles if name != self.scoring.main)
        columns = [
            "model",
            "trained",
            f"one {self.scoring.unit}",
            "tokens/s",
            "minutes",
            *scores,
            f"{self.scoring.titles[second]} all",
            "win ratio",
            "difference",
        ]
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            trained, _, one, *speed = _costs(row.costs)
            cells = [_cell(row.groups.get(group, {}).get(self.scoring.main)) for group in groups]
            cells.append(_cell(row.groups.get("all", {}).get(second)))
            table.add_row(
                Text(row.title), trained, one, *speed, *cells, self._ratio(row), row.certainty or "–"
            )
        return table


def _costs(costs: Costs) -> list[str]:
    sizes = [human(number) for number in (costs.parameters, costs.serving_all, costs.serving_one)]
    if costs.serving_at_most:
        sizes[-1] = f"at most {sizes[-1]}"
    if not costs.parameters:  # the unchanged base model
        return ["–", *sizes[1:], "–", "–"]
    return [*sizes, _cell(costs.tokens_per_second, ",.0f"), _cell(costs.minutes)]


def _cell(value: Spread | None, form: str = ",.1f") -> str:
    return MISSING if value is None else value.text(form)


def _spread(value: Mapping[str, Any] | None) -> Spread | None:
    return None if value is None else Spread(**value)


def _scores_of(value: Mapping[str, Mapping[str, Any]]) -> Scores:
    return {metric: Spread(**spread) for metric, spread in value.items()}
