"""Which experts each task chooses: the shares of a model's MoE layers, ordered so that kin stand together, and drawn.

``routing.json`` holds them::

    {"layers": [{"side": "encoder" | "decoder", "layer": 1, "experts": 8, "top_k": 2, "routing": "task" | "token",
                 "task": "target" | "pair", "tasks": ["de", ...], "shares": [[E floats], ...]}]}

``layer`` counts from 0. A row of ``shares`` belongs to a task and sums to 1. Under task routing it is the router's
probability of each expert (the softmax before the top-k is taken), so the ``top_k`` largest are the experts the task
uses. Under token routing it is the share of the task's tokens that each expert received, every one of a token's top-k
choices counting alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import TASKS, family, language_name, task_language, task_order

UNKNOWN = "Unknown"


@dataclass(frozen=True)
class LayerRouting:
    """Expert shares of one MoE layer: ``shares[t][e]`` of task t for expert e."""

    side: str
    layer: int
    experts: int
    top_k: int
    routing: str
    task: str
    tasks: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def title(self) -> str:
        return f"{self.side} layer {self.layer + 1}"

    def ordered(self) -> LayerRouting:
        """The same with its tasks ordered by family, then script, then name."""
        order = sorted(range(len(self.tasks)), key=lambda index: task_order(self.tasks[index]))
        return LayerRouting(
            self.side,
            self.layer,
            self.experts,
            self.top_k,
            self.routing,
            self.task,
            tuple(self.tasks[index] for index in order),
            tuple(self.shares[index] for index in order),
        )

    def chosen(self, index: int) -> frozenset[int]:
        """The ``top_k`` experts with the largest shares of a task; of equal ones the first, as ``torch.topk`` does on CPU."""
        row = self.shares[index]
        return frozenset(sorted(range(self.experts), key=lambda expert: (-row[expert], expert))[: self.top_k])

    def alike(self) -> list[tuple[str, ...]]:
        """Tasks that use the very same experts, in groups of two and more, in the order of ``tasks``."""
        groups: dict[frozenset[int], list[str]] = {}
        for index, task in enumerate(self.tasks):
            groups.setdefault(self.chosen(index), []).append(task)
        return [tuple(tasks) for tasks in groups.values() if len(tasks) > 1]

    def overlap(self) -> tuple[float | None, float | None]:
        """Mean number of experts that two tasks share: of the same family, and of different ones; None without such a pair.

        Languages of unknown family are left out.
        """
        shared: dict[bool, list[int]] = {True: [], False: []}
        known = [index for index, task in enumerate(self.tasks) if task_family(task) != UNKNOWN]
        for a, b in combinations(known, 2):
            kin = task_family(self.tasks[a]) == task_family(self.tasks[b])
            shared[kin].append(len(self.chosen(a) & self.chosen(b)))
        same, different = (sum(found) / len(found) if found else None for found in (shared[True], shared[False]))
        return same, different


def task_family(task: str) -> str:
    return family(task_language(task))


def task_name(task: str) -> str:
    return " → ".join(language_name(code) for code in task.split("-"))


def read_routing(path: Path) -> list[LayerRouting]:
    """Layers of a ``routing.json``, the encoder's first, each ordered. Raises UserError if it is not one."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        found = [_layer(layer) for layer in layers]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise UserError(f"{path} cannot be read: {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return sorted((layer.ordered() for layer in found), key=lambda layer: (layer.side != "encoder", layer.layer))


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
    )
    if layer.side not in ("encoder", "decoder") or layer.routing not in ("task", "token") or layer.task not in TASKS:
        raise ValueError(f"{layer.title}: side, routing or task is none of those allowed")
    if len(shares) != len(layer.tasks) or any(len(row) != layer.experts for row in shares):
        raise ValueError(f"{layer.title}: the shares are not one row a task and one column an expert")
    if not all(0 <= share <= 1 for row in shares for share in row) or not all(math.isclose(sum(row), 1, abs_tol=1e-3) for row in shares):
        raise ValueError(f"{layer.title}: a row of shares does not sum to 1")
    return layer


TEXT_WIDTH = 6.4  # pixels that a letter of 12 px takes, on average at most, in the usual system fonts
# Colors come from custom properties, so that a page can set them for light and dark; the fallbacks serve a page that does not.
STYLE = """
.heat text{font:12px system-ui,sans-serif;fill:var(--text,#1d2329)}
.heat .quiet{fill:var(--quiet,#5c6670)}
.heat .family{font-size:11px}
.heat .n{text-anchor:middle;font-size:11px}
.heat .half{fill:#10151a}
.heat .over{fill:var(--over,#fff)}
.heat rect{fill:var(--model,#0072b2)}
.heat .frame{fill:none;stroke:var(--text,#1d2329);stroke-width:1.5}
"""


def heat_map(layer: LayerRouting) -> Markup:
    """An SVG element: a row for each task (grouped by family), a column for each expert, the darker the larger the share.

    Under task routing the chosen experts are framed. Shares are written in percent as long as there are 16 experts or fewer.
    """
    wide = layer.experts <= 16
    width, height, top = (26 if wide else 18 if layer.experts <= 32 else 7), 24, 20
    families = [task_family(task).split(", ")[-1] for task in layer.tasks]  # of "Indo-European, Slavic" the branch
    names = [task_name(task) for task in layer.tasks]
    left = 6 + max((TEXT_WIDTH * len(name) for name in names), default=0)
    largest = max((share for row in layer.shares for share in row), default=0.0) or 1.0

    parts: list[Markup] = []
    for expert in range(layer.experts):
        if wide or expert % 8 == 0:
            parts.append(_text(left + (expert + 0.5) * width, 13, expert + 1, "quiet n"))
    y = float(top)
    for index, row in enumerate(layer.shares):
        if families[0] != families[-1] and (index == 0 or families[index] != families[index - 1]):
            parts.append(_text(0, y + 15, families[index], "quiet family"))
            y += 19
        parts.append(_text(0, y + 16, names[index], ""))
        chosen = layer.chosen(index) if layer.routing == "task" else frozenset()
        for expert, share in enumerate(row):
            x, strength = left + expert * width, share / largest
            title = f"{names[index]}, expert {expert + 1}: {share:.1%}" + (", chosen" if expert in chosen else "")
            cell = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" fill-opacity="{}"><title>{}</title></rect>')
            parts.append(cell.format(_n(x + 1), _n(y + 1), width - 2, height - 2, _n(0.04 + 0.96 * strength), title))
            if wide:
                parts.append(_text(x + width / 2, y + 16, f"{100 * share:.0f}", _ink(strength)))
        for expert in sorted(chosen):
            frame = Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{}" rx="3"/>')
            parts.append(frame.format(_n(left + expert * width + 1), _n(y + 1), width - 2, height - 2))
        y += height
    total = (_n(left + layer.experts * width + 2), _n(y + 2))
    svg = Markup('<svg class="heat" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">{}{}</svg>')
    style = Markup("<style>{}</style>").format(Markup(STYLE))
    return svg.format(f"Expert shares of {layer.title}", *total, *total, style, Markup("").join(parts))


def _ink(strength: float) -> str:
    """Class of a number on a cell: the text color while the cell is pale, dark on half strength, the inverse on full."""
    return "n over" if strength > 0.8 else "n half" if strength > 0.55 else "n"


def _text(x: float, y: float, content: object, classes: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(_n(x), _n(y), classes, content)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
