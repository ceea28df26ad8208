"""``lsmoe analyze routing``: measure which experts a model's tasks use.

The output folder holds ``routing.json`` (see :mod:`lsmoe_ds.analysis.routing`), ``routing.csv`` (share of
each expert), ``similarity.csv`` (overlap of every two tasks), ``SIDE-LAYER.svg``, ``index.html`` and
``summary.json``. Layers and experts count from 0 in JSON and CSV, from 1 in file names and pictures.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsmoe_ds.analysis.heat_map import as_file, heat_map, largest_share
from lsmoe_ds.analysis.measures import measure_layer, similarity
from lsmoe_ds.analysis.page import render_page
from lsmoe_ds.analysis.routing import Routing
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_can_write, locked, read_json, replaced, write_json

FORMAT = "lsmoe_ds routing"
SUMMARY = "summary.json"


def analyze_routing(
    run: str | Path, out: str | Path, split: str = "test", route: str = "specific"
) -> dict[str, Any]:
    """Analyze a run (its newest checkpoint), a checkpoint or a converted folder.

    Returns the content of ``summary.json``. Raises UserError for a model without experts or without that
    route, and if ``out`` holds files that were not written here.
    """
    # These import torch.
    from lsmoe_ds.analysis.measuring import measure_routing
    from lsmoe_ds.checkpoint.stored import find_model
    from lsmoe_ds.data.held_out import HELD_OUT
    from lsmoe_ds.data.prepared import open_data
    from lsmoe_ds.inference.load import load

    if split not in HELD_OUT:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(HELD_OUT)}")
    check_out(Path(out))
    if not any(find_model(run).recipe.model.moe_layers()):
        raise UserError(f"{run} is a dense model: it has no experts whose routing could be analyzed")
    loaded = load(run, route=route)
    layers = measure_routing(loaded, open_data(loaded), split)
    return write_analysis(Path(out), loaded.recipe.name, loaded.step, layers)


def check_out(out: Path, kind: str = FORMAT) -> None:
    """Raise UserError if ``out`` is a file, or holds anything but an analysis of this ``kind``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder with --out")
    check_can_write(out.absolute().parent, "choose another folder with --out")
    if not out.is_dir():
        return
    summary = read_json(out / SUMMARY) or {}
    files = summary.get("files")
    ours = {SUMMARY, *files} if summary.get("format") == kind and isinstance(files, list) else set()
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise UserError(
            f"{out} holds {others[0]}, which lsmoe did not write: choose another folder with --out"
        )


def write_analysis(out: Path, name: str, step: int, routing: Routing) -> dict[str, Any]:
    """Write the folder completely or not at all, replacing an earlier analysis; return the summary."""
    check_out(out)
    layers = sorted(
        (layer.ordered() for layer in routing.layers),
        key=lambda layer: (layer.side != "encoder", layer.layer),
    )
    routing = Routing(routing.split, routing.multiway, routing.pairs, tuple(layers))
    out = out.resolve()
    with locked(out), replaced(out) as new:
        texts = {
            "routing.json": json.dumps(routing.to_dict()) + "\n",
            "index.html": render_page(name, step, routing),
        }
        full = largest_share(layers)
        texts |= {f"{layer.name}.svg": as_file(heat_map(layer, full)) for layer in layers}
        for file, text in texts.items():
            (new / file).write_text(text, encoding="utf-8")
        write_csv(new / "routing.csv", ("side", "layer", "task", "expert", "share"), _share_rows(routing))
        write_csv(
            new / "similarity.csv",
            ("side", "layer", "task", "other", "similarity"),
            _similarity_rows(routing),
        )
        summary = {
            "format": FORMAT,
            "name": name,
            "step": step,
            "split": routing.split,
            "multiway": routing.multiway,
            "pairs": routing.pairs,
            "layers": [
                {
                    key: getattr(layer, key)
                    for key in ("side", "layer", "experts", "top_k", "routing", "task", "dropped")
                }
                | {"tasks": len(layer.tasks)}
                | measure_layer(layer).to_dict()
                | ({"alike": layer.alike(), "shared_experts": layer.overlap()} if layer.by_task else {})
                for layer in layers
            ],
            "files": sorted(path.name for path in new.iterdir()),
        }
        write_json(new / SUMMARY, summary)
    return summary


def write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table with a line of column names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _share_rows(routing: Routing) -> Iterable[tuple[Any, ...]]:
    for layer in routing.layers:
        for task, row in zip(layer.tasks, layer.shares, strict=True):
            for expert, share in enumerate(row):
                yield layer.side, layer.layer, task, expert, f"{share:.6g}"


def _similarity_rows(routing: Routing) -> Iterable[tuple[Any, ...]]:
    """Yield a row for every two tasks."""
    for layer in routing.layers:
        similar = similarity(layer).tolist()
        for index, task in enumerate(layer.tasks):
            for other in range(index + 1, len(layer.tasks)):
                yield layer.side, layer.layer, task, layer.tasks[other], f"{similar[index][other]:.6g}"
