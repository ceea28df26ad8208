"""The expert shares of each task in a model's MoE layers, ordered so that related tasks are neighbors.

``routing.json`` holds them::

    {"split": "test", "multiway": N | null, "pairs": N,
     "layers": [{"side": "encoder" | "decoder", "layer": 1, "experts": 8, "top_k": 2,
                 "routing": "token" | "sentence" | "task" | "static", "task": "target" | "source" | "pair",
                 "tasks": ["de", ...], "shares": [[E floats], ...],
                 "tokens": [N, ...] | null, "load": [E floats] | null, "dropped": float | null}]}

``layer`` and experts count from 0. A row of ``shares`` belongs to one task and sums to 1. Under task routing
it is the router's probability of each expert (the softmax before the top-k), so the ``top_k`` largest are the
experts that the task uses. Under any other routing it is the share of the task's tokens that each expert
received; all top-k choices of a token count equally. ``tokens`` is the number of routed tokens of each task.
``load`` is the share of all tokens that each expert received. ``dropped`` is the share of choices dropped
because their expert was full. These three are null if nothing was measured. ``multiway`` is the number of
English sentences that all bitexts have in common, if the routing was measured on these, otherwise null.
``pairs`` is the number of sentence pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lsmoe_ds.directions import TASKS, task_language, task_order
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import family, is_english, language_name

UNKNOWN = "Unknown"
SIDES = ("encoder", "decoder")
ROUTINGS = ("token", "sentence", "task", "static")


@dataclass(frozen=True)
class LayerRouting:
    """The expert shares of one MoE layer, ``shares[t][e]`` for task t and expert e.

    The fields are those of ``routing.json``.
    """

    side: str
    layer: int
    experts: int
    top_k: int
    routing: str
    task: str
    tasks: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...] | None = None
    load: tuple[float, ...] | None = None
    dropped: float | None = None

    @property
    def title(self) -> str:
        return f"{self.side} layer {self.layer + 1}"

    @property
    def name(self) -> str:
        """Return the name in file names, ``encoder-2``, counted from 1 as in the title."""
        return f"{self.side}-{self.layer + 1}"

    @property
    def by_task(self) -> bool:
        """Tell whether all tokens of a task use the same experts."""
        return self.routing in ("task", "static")

    def ordered(self) -> LayerRouting:
        """Return a copy whose tasks are ordered by section (of pairs), family, script and name."""
        order = sorted(
            range(len(self.tasks)),
            key=lambda index: (task_section(self.tasks[index])[0], task_order(self.tasks[index])),
        )
        tokens = self.tokens and tuple(self.tokens[index] for index in order)
        tasks, shares = (
            tuple(self.tasks[index] for index in order),
            tuple(self.shares[index] for index in order),
        )
        return replace(self, tasks=tasks, shares=shares, tokens=tokens)

    def chosen(self, index: int) -> frozenset[int]:
        """Return the ``top_k`` experts with the largest shares of a task.

        Among equal shares the first expert wins, as with ``torch.topk`` on a CPU.
        """
        row = self.shares[index]
        best = sorted(range(self.experts), key=lambda expert: (-row[expert], expert))[: self.top_k]
        return frozenset(expert for expert in best if row[expert] > 0)

    def used(self, index: int) -> tuple[float, ...]:
        """Return the share of a task's tokens that each expert receives [E].

        Under task routing the chosen experts receive equal shares.
        """
        if self.routing != "task":
            return self.shares[index]
        chosen = self.chosen(index)
        return tuple(1 / len(chosen) if expert in chosen else 0.0 for expert in range(self.experts))

    def alike(self) -> list[tuple[str, ...]]:
        """Return groups of two or more tasks that use exactly the same experts, in the order of ``tasks``."""
        groups: dict[frozenset[int], list[str]] = {}
        for index, task in enumerate(self.tasks):
            groups.setdefault(self.chosen(index), []).append(task)
        return [tuple(tasks) for tasks in groups.values() if len(tasks) > 1]

    def kin(self) -> list[tuple[int, int, bool]]:
        """Return the indexes of every two comparable tasks, and whether they are of one family.

        Languages of unknown family are left out. Pairs are compared only within a section, such as out of
        English.
        """
        families = [task_family(task) for task in self.tasks]
        sections = [task_section(task) for task in self.tasks]
        known = [index for index in range(len(self.tasks)) if families[index] != UNKNOWN]
        return [
            (a, b, families[a] == families[b])
            for a, b in combinations(known, 2)
            if sections[a] == sections[b]
        ]

    def overlap(self) -> tuple[float | None, float | None]:
        """Return the mean number of chosen experts that two tasks share.

        The first value is for tasks of one family, the second for different families; None if there are no
        such tasks.
        """
        shared: dict[bool, list[int]] = {True: [], False: []}
        chosen = [self.chosen(index) for index in range(len(self.tasks))]
        for a, b, same in self.kin():
            shared[same].append(len(chosen[a] & chosen[b]))
        same_family, different = (
            sum(found) / len(found) if found else None for found in (shared[True], shared[False])
        )
        return same_family, different


@dataclass(frozen=True)
class Routing:
    """The routing of a whole model, as ``routing.json`` holds it."""

    split: str
    multiway: int | None
    pairs: int
    layers: tuple[LayerRouting, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def task_family(task: str) -> str:
    return family(task_language(task))


def task_section(task: str) -> tuple[int, str]:
    """Return the rank and heading of a task's section.

    The sections are pairs out of English, into English and between others; languages have the heading "".
    """
    source, _, target = task.partition("-")
    if not target:
        return 0, ""
    return (
        (0, "Out of English")
        if is_english(source)
        else (1, "Into English")
        if is_english(target)
        else (2, "Between others")
    )


def task_name(task: str) -> str:
    """Name the languages of a task: ``English → German``, or one language alone, ``German``."""
    return " → ".join(language_name(code) for code in dict.fromkeys(task.split("-")))


def read_routing(path: Path) -> list[LayerRouting]:
    """Read the layers of a ``routing.json``, the encoder's first, each ordered. UserError if damaged."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        found = [_layer(layer) for layer in layers]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise UserError(f"{path} cannot be read: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return sorted(
        (layer.ordered() for layer in found), key=lambda layer: (layer.side != "encoder", layer.layer)
    )


def _layer(value: Mapping[str, Any]) -> LayerRouting:
    shares = tuple(tuple(float(share) for share in row) for row in value["shares"])
    layer = LayerRouting(
        side=str(value["side"]),
        layer=int(value["layer"]),
        experts=int(value["experts"]),
        top_k=int(value["top_k"]),
        routing=str(value["routing"]),
        task=str(value["task"]),
        tasks=tuple(str(task) for task in value["tasks"]),
        shares=shares,
        # Files of earlier versions have none of these.
        tokens=None if value.get("tokens") is None else tuple(int(count) for count in value["tokens"]),
        load=None if value.get("load") is None else tuple(float(share) for share in value["load"]),
        dropped=None if value.get("dropped") is None else float(value["dropped"]),
    )
    if layer.side not in SIDES or layer.routing not in ROUTINGS or layer.task not in TASKS:
        raise ValueError(f"{layer.title}: side, routing or task is none of those allowed")
    if len(shares) != len(layer.tasks) or any(len(row) != layer.experts for row in shares):
        raise ValueError(
            f"{layer.title}: the shares need one row for each task and one column for each expert"
        )
    if not all(0 <= share <= 1 for row in shares for share in row) or not all(
        math.isclose(sum(row), 1, abs_tol=1e-3) for row in shares
    ):
        raise ValueError(f"{layer.title}: a row of shares does not sum to 1")
    if layer.tokens is not None and (
        len(layer.tokens) != len(layer.tasks) or min(layer.tokens, default=0) < 0
    ):
        raise ValueError(f"{layer.title}: the tokens need one count for each task")
    if layer.load is not None and (
        len(layer.load) != layer.experts or not all(0 <= share <= 1 for share in layer.load)
    ):
        raise ValueError(f"{layer.title}: the load needs one share for each expert")
    if layer.dropped is not None and not 0 <= layer.dropped <= 1:
        raise ValueError(f"{layer.title}: the dropped share is not between 0 and 1")
    return layer
