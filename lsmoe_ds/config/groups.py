"""The section ``data.groups`` of a recipe: which languages and bitexts are rich and which are poor."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import model_validator

from lsmoe_ds.config.section import Positive, Section, first_twice
from lsmoe_ds.directions import GROUPS


class Groups(Section):
    """Sort languages and bitexts into resource groups, by thresholds or by lists of languages.

    A threshold is the smallest number of training pairs of a group. Languages below the smallest threshold
    form one more group: low, or very_low if ``low`` has a threshold, too.
    """

    high: Positive | list[str] | None = 1_000_000
    medium: Positive | list[str] | None = 100_000
    low: Positive | list[str] | None = None
    very_low: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """Use the default thresholds if nothing is given, and no defaults if lists are given."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            return value
        given = {key: each for key, each in value.items() if each is not None}
        lists = any(isinstance(each, list) for each in given.values())
        return {"high": None, "medium": None, **given} if lists else given

    @model_validator(mode="after")
    def _one_kind(self) -> Groups:
        given = {name: value for name in GROUPS if (value := getattr(self, name)) is not None}
        lists = [name for name, value in given.items() if isinstance(value, list)]
        limits = [name for name in given if name not in lists]
        if lists and limits:
            raise ValueError(
                f"'{lists[0]}' is a list and '{limits[0]}' a number: give each group its languages, or give "
                "'high', 'medium' and, if need be, 'low' the smallest number of training pairs"
            )
        for above, below in pairwise(limits):
            if given[below] > given[above]:
                raise ValueError(
                    f"'{below}' is {given[below]}, which is more than {given[above]}, the value of '{above}'"
                    ": it must be at most that"
                )
        if twice := first_twice(code for name in lists for code in given[name]):
            raise ValueError(f"{twice} is in the groups twice: name it once")
        return self

    @property
    def listed(self) -> dict[str, str]:
        """Return the group of each language, or nothing if thresholds are given."""
        lists = {name: value for name in GROUPS if isinstance(value := getattr(self, name), list)}
        return {code: name for name, codes in lists.items() for code in codes}

    def of(self, pairs: int) -> str:
        """Return the group of ``pairs`` training pairs by the thresholds."""
        limits = {name: value for name in GROUPS if isinstance(value := getattr(self, name), int)}
        return next((name for name, least in limits.items() if pairs >= least), GROUPS[len(limits)])

    def of_bitext(self, bitext: str, pairs: int) -> str:
        """Return the group of a bitext (``de-en``): that of its poorer language, or by its training pairs."""
        if listed := self.listed:
            return max((listed[code] for code in bitext.split("-")), key=GROUPS.index)
        return self.of(pairs)
