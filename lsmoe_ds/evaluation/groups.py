"""Average scores over groups of directions: into and out of English, between others, and by resources.
Scores of labelled languages are averaged only by resources.

An average is the plain mean over its directions, whatever their numbers of sentences. A direction's resource
group is that of its bitext: by the number of training pairs, or that of its poorer language. If some
directions are between other languages than English, directions are also averaged by the groups of their
source and target: ``H2V`` is the average from languages of the group high into those of very_low.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lsmoe_ds.config.groups import Groups
from lsmoe_ds.directions import GROUPS as RESOURCES
from lsmoe_ds.directions import Direction
from lsmoe_ds.languages import is_english

GROUPS = ("into_english", "out_of_english", "between_others", "all", *RESOURCES)
CLASSES = {
    f"{source[0]}2{target[0]}".upper(): (source, target) for source in RESOURCES for target in RESOURCES
}
# The titles of averages; the title of "all" depends on the task.
AVERAGES = {
    "into_english": "into English",
    "out_of_english": "out of English",
    "between_others": "between others",
    "high": "high resource",
    "medium": "medium resource",
    "low": "low resource",
    "very_low": "very low resource",
} | {name: f"{name}: {source} into {target}".replace("_", " ") for name, (source, target) in CLASSES.items()}


@dataclass(frozen=True)
class Metrics:
    """Scores by the name of the metric, each from 0 to 100.

    The names are those of a task in :data:`lsmoe_ds.evaluation.metrics.TASKS`.
    """

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def as_dict(self) -> dict[str, float]:
        return dict(self.values)

    @classmethod
    def mean(cls, several: Sequence[Metrics]) -> Metrics:
        """Average the metrics, of one task, of at least one direction."""
        return cls({name: sum(m[name] for m in several) / len(several) for name in several[0].values})


class Scored(Protocol):
    """A direction's scores, and the scores of copying its source if it was translated."""

    @property
    def direction(self) -> Direction: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def copy(self) -> Metrics | None: ...


@dataclass(frozen=True)
class Average:
    """The mean scores over ``directions`` directions or languages, and those of copying their sources."""

    directions: int
    metrics: Metrics
    copy: Metrics | None

    def as_dict(self) -> dict[str, Any]:
        copied = {} if self.copy is None else {"copy": self.copy.as_dict()}
        return {"directions": self.directions, **self.metrics.as_dict(), **copied}

    @classmethod
    def of(cls, scores: Sequence[Scored]) -> Average:
        """Average at least one direction."""
        copies = [score.copy for score in scores if score.copy is not None]
        copy = Metrics.mean(copies) if len(copies) == len(scores) else None
        return cls(len(scores), Metrics.mean([score.metrics for score in scores]), copy)


def resource_groups(pairs: Mapping[str, int], groups: Groups) -> dict[str, str]:
    """Return the resource group of each bitext (``de-en``) in ``pairs``, the numbers of training pairs."""
    return {bitext: groups.of_bitext(bitext, count) for bitext, count in pairs.items()}


def membership(
    direction: Direction, resources: Mapping[str, str], groups: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the groups of :data:`GROUPS` to which a direction belongs.

    ``resources`` maps bitexts to resource groups; ``groups`` maps languages, used for a single language. Both
    may lack some.
    """
    if direction.alone:
        found = (groups or {}).get(direction.source)
        return ("all",) if found is None else ("all", found)
    if is_english(direction.target):
        side = "into_english"
    elif is_english(direction.source):
        side = "out_of_english"
    else:
        side = "between_others"
    resource = resources.get(direction.bitext)
    return (side, "all") if resource is None else (side, "all", resource)


def averages(
    scores: Iterable[Scored], resources: Mapping[str, str], groups: Mapping[str, str]
) -> dict[str, Average]:
    """Average the groups that have a direction, in the order of :data:`GROUPS` and :data:`CLASSES`.

    ``groups`` maps languages to resource groups; it may lack some languages.
    """
    members: dict[str, list[Scored]] = {name: [] for name in (*GROUPS, *CLASSES)}
    classes = {between: name for name, between in CLASSES.items()}
    for score in scores:
        names = list(membership(score.direction, resources, groups))
        between = groups.get(score.direction.source, ""), groups.get(score.direction.target, "")
        for name in [*names, *([classes[between]] if between in classes else [])]:
            members[name].append(score)
    if not members["between_others"]:
        members = {name: members[name] for name in GROUPS}
    return {name: Average.of(found) for name, found in members.items() if found}
