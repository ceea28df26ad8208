"""``lsmoe analyze structure`` and ``subspaces``: what methods find in the weights of a trained model.

The output folder holds ``KIND.json`` and ``KIND.csv`` (all numbers; layers count from 0), a picture of each
grid, ``index.html``, ``recipe.yaml`` if the analysis suggests one, and ``summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lsmoe_ds.analysis.command import SUMMARY, check_out, write_csv
from lsmoe_ds.analysis.curves import draw_curve
from lsmoe_ds.analysis.grids import draw_grid
from lsmoe_ds.analysis.heat_map import as_file
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import locked, replaced, write_json
from lsmoe_ds.methods.findings import Curve, Findings, Grid
from lsmoe_ds.pages import open_template

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lsmoe_ds analysis"


def analyze_weights(run: str | Path, kind: str, out: str | Path) -> dict[str, Any]:
    """Analyze the weights of a run (its newest checkpoint) or a checkpoint, and return ``summary.json``.

    Raises UserError for a model whose methods have nothing of this kind, and if ``out`` holds files that were
    not written here.
    """
    # These import torch.
    from lsmoe_ds.checkpoint.stored import find_model, read_weights

    check_out(Path(out), FORMAT)
    stored = find_model(run)
    weights = read_weights(stored)
    found = find(stored.recipe, weights.tensors, kind, f"{run}")
    return write_findings(Path(out), kind, stored.recipe.name, weights.step, found)


def find(recipe: Recipe, tensors: Mapping[str, Tensor], kind: str, name: str) -> Findings:
    """Return the findings of the first method with this kind of analysis. Raises UserError if none has it."""
    from lsmoe_ds.checkpoint.tensors import Tensors
    from lsmoe_ds.model.methods import methods_of
    from lsmoe_ds.parallel.topology import Topology

    whys, weights = [], Tensors.of(tensors)
    for method in methods_of(recipe, Topology.single()):
        if kind in method.analyses:
            why = method.why_not(kind, weights)
            if why is None:
                return method.analyze(kind, weights)
            whys.append(f"{method.name}: {why}")
    raise UserError(f"{name} has nothing for 'analyze {kind}': {'; '.join(whys) or 'no method of it has'}")


def find_all(run: Path, recipe: Recipe) -> list[Findings]:
    """Return all findings of methods in the weights of a run's newest checkpoint, if that is readable."""
    if not recipe.model.methods:
        return []
    from lsmoe_ds.checkpoint.stored import find_model, read_weights
    from lsmoe_ds.checkpoint.tensors import Tensors
    from lsmoe_ds.model.methods import methods_of
    from lsmoe_ds.parallel.topology import Topology

    try:
        weights = Tensors.of(read_weights(find_model(run)).tensors)
        return [
            method.analyze(kind, weights)
            for method in methods_of(recipe, Topology.single())
            for kind in method.analyses
            if method.why_not(kind, weights) is None
        ]
    except UserError:
        return []


def draw(found: Grid | Curve) -> Markup:
    """Return the picture of a grid or a curve, an SVG element."""
    return draw_curve(found) if isinstance(found, Curve) else draw_grid(found)


def write_findings(out: Path, kind: str, name: str, step: int, found: Findings) -> dict[str, Any]:
    """Write the folder completely or not at all, replacing an earlier analysis; return the summary."""
    pictures = [(grid, draw(grid)) for grid in found.grids]
    summary = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "step": step,
        "title": found.title,
        "said": found.said,
    }
    with locked(out.resolve()), replaced(out.resolve()) as new:
        page = open_template("lsmoe_ds.analysis", "findings.html")
        text = page.render(name=name, step=step, found=found, pictures=pictures)
        (new / "index.html").write_text(text, encoding="utf-8")
        for grid, picture in pictures:
            (new / f"{grid.name}.svg").write_text(as_file(Markup(picture)), encoding="utf-8")
        everything = {**summary, "records": found.records, "grids": [vars(grid) for grid in found.grids]}
        (new / f"{kind}.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        for file, records in {kind: found.records, **found.more}.items():
            if records:
                head = list(records[0])
                write_csv(new / f"{file}.csv", head, ([row[key] for key in head] for row in records))
        if found.recipe is not None:
            (new / "recipe.yaml").write_text(found.recipe.to_yaml(), encoding="utf-8")
        summary["files"] = sorted(path.name for path in new.iterdir())
        write_json(new / SUMMARY, summary)
    return summary
