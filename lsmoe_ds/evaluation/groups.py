"""Average scores over groups of directions: into and out of English, between others, and by resources.

An average is the plain mean over its directions, whatever their numbers of sentences. A direction's resource
group is that of its bitext: by the number of training pairs, or that of its rarer language. Where not all
directions touch English, they are also averaged by the classes of their source and target: ``H2V`` has those
from languages of the group high into very_low.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lsmoe_ds.config.data import Groups
from lsmoe_ds.languages import GROUPS as RESOURCES
from lsmoe_ds.languages import Direction, is_english

GROUPS = ("into_english", "out_of_english", "between_others", "all", *RESOURCES)
CLASSES = {
    f"{source[0]}2{target[0]}".upper(): (source, target) for source in RESOURCES for target in RESOURCES
}


@dataclass(frozen=True)
class Metrics:
    """BLEU, chrF (characters only) and chrF++ (with words and word pairs), each from 0 to 100."""

    bleu: float
    chrf: float
    chrfpp: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def mean(cls, several: Sequence[Metrics]) -> Metrics:
        """Average at least one direction's metrics."""
        count = len(several)
        return cls(
            sum(m.bleu for m in several) / count,
            sum(m.chrf for m in several) / count,
            sum(m.chrfpp for m in several) / count,
        )


class Scored(Protocol):
    """A direction's scores, and the scores of copying its source."""

    @property
    def direction(self) -> Direction: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def copy(self) -> Metrics: ...


@dataclass(frozen=True)
class Average:
    """The mean scores over ``directions`` directions, and those of copying their sources."""

    directions: int
    metrics: Metrics
    copy: Metrics

    def as_dict(self) -> dict[str, Any]:
        return {"directions": self.directions, **self.metrics.as_dict(), "copy": self.copy.as_dict()}


def resource_groups(pairs: Mapping[str, int], groups: Groups) -> dict[str, str]:
    """Return the resource group of each bitext (``de-en``), whose training pairs are counted in ``pairs``."""
    return {bitext: groups.of_bitext(bitext, count) for bitext, count in pairs.items()}


def membership(direction: Direction, resources: Mapping[str, str]) -> tuple[str, ...]:
    """Return the groups of :data:`GROUPS` to which a direction belongs.

    ``resources`` maps bitexts to resource groups; it may lack some bitexts.
    """
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
        names = list(membership(score.direction, resources))
        between = groups.get(score.direction.source, ""), groups.get(score.direction.target, "")
        for name in [*names, *([classes[between]] if between in classes else [])]:
            members[name].append(score)
    if not members["between_others"]:
        members = {name: members[name] for name in GROUPS}
    return {
        name: Average(
            len(found), Metrics.mean([s.metrics for s in found]), Metrics.mean([s.copy for s in found])
        )
        for name, found in members.items()
        if found
    }
