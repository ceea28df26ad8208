"""Scores a model on the held-out text, and writes down which experts each task uses."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lsmoe_ds.analysis.routing import LayerRouting
from lsmoe_ds.data.batching import DirectionIds, collate
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import resource_groups
from lsmoe_ds.evaluation.scores import DirectionScore, ScoreTable, score_direction
from lsmoe_ds.folders import sha256, write_whole
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.languages import parse_directions
from lsmoe_ds.moe.routers import Routes

SPLITS = ("test", "dev")
ROUTED_SENTENCES = 200  # of each direction, on which token routing is measured
ROUTED_BATCH = 32


def evaluate(
    run: str | Path,
    directions: Sequence[str] | None = None,
    beam: int = 5,
    length_penalty: float = 1.0,
    split: str = "test",
    limit: int | None = None,
    progress: bool = True,
) -> ScoreTable:
    """Translates the held-out text of every direction and scores it; writes ``scores.json`` and, for a model with
    experts, ``routing.json`` beside its recipe.

    ``run`` is a run folder, a checkpoint in it or a converted folder; ``limit`` takes the first so many sentences of each
    direction. Raises UserError for directions that the model lacks, and for prepared data that is not the run's.
    """
    if split not in SPLITS:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(SPLITS)}")
    search = Search(beam, length_penalty)
    loaded = load(run)
    chosen = parse_directions(directions, loaded.languages) if directions else list(loaded.languages.directions)
    data = open_data(loaded)
    texts = {direction: [side[:limit] for side in data.text(direction, split)] for direction in chosen}
    scores: list[DirectionScore] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("translating", total=sum(len(source) for source, _ in texts.values()), rate="")
        began, translated = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal translated
            translated += count
            bar.update(task, advance=count, rate=f"{translated / (time.perf_counter() - began):.0f} sentences/s")

        for direction, (sources, references) in texts.items():
            bar.update(task, description=f"translating {direction}")
            start = time.perf_counter()
            hypotheses = translate_all(loaded, direction, sources, search, advance=advance)
            scores.append(score_direction(direction, sources, hypotheses, references, time.perf_counter() - start))
    pairs = {bitext: splits["train"]["pairs"] for bitext, splits in data.manifest["bitexts"].items()}
    resources = resource_groups(pairs, loaded.recipe.data.groups)
    table = ScoreTable(loaded.recipe.name, loaded.step, split, beam, length_penalty, tuple(scores), resources)
    table.write(loaded.home / "scores.json")
    layers = routing(loaded, data, split)
    if layers:
        write_whole(loaded.home / "routing.json", json.dumps({"layers": [asdict(layer) for layer in layers]}) + "\n")
    return table


def open_data(loaded: Loaded) -> PreparedData:
    """The prepared data of a model's recipe. Raises UserError if it was prepared anew since, with another vocabulary."""
    data = PreparedData.open(loaded.recipe.prepared)
    if sha256(data.folder / "vocabulary.model") != sha256(loaded.home / "vocabulary.model"):
        raise UserError(f"the vocabulary in {data.folder} is not that of {loaded.home}: it was prepared anew after this training began")
    return data


def routing(loaded: Loaded, data: PreparedData, split: str) -> list[LayerRouting]:
    """The expert shares of each MoE layer: of task routing the router's probabilities, of token routing what is measured
    over held-out pairs (up to 200 of each direction; a task without any is left out)."""
    settings = list(loaded.recipe.model.moe_layers())
    measured = _measure(loaded, data, split) if any(moe.routing == "token" for _, _, moe in settings) else {}
    layers = []
    for side, number, moe in settings:
        names = loaded.languages.tasks(moe.task)
        if moe.routing == "task":
            shares = _router(loaded, side, number).weight.detach().float().softmax(-1).cpu()  # type: ignore[operator]
        else:
            counts = measured[side, number]
            names = tuple(name for name, row in zip(names, counts, strict=True) if row.sum())
            counts = counts[counts.sum(1) > 0]
            shares = counts / counts.sum(1, keepdim=True)
        rows = tuple(tuple(row) for row in shares.tolist())
        layers.append(LayerRouting(side, number, moe.experts, moe.top_k, moe.routing, moe.task, names, rows))
    return layers


def _router(loaded: Loaded, side: str, layer: int) -> torch.nn.Module:
    return loaded.model.get_submodule(f"{side}.{layer}.feed_forward.router")


@torch.inference_mode()
def _measure(loaded: Loaded, data: PreparedData, split: str) -> dict[tuple[str, int], torch.Tensor]:
    """Tokens of each task that each expert received [tasks, E] in each token-routed layer, over held-out pairs."""
    counts, hooks = {}, []
    for side, layer, moe in loaded.recipe.model.moe_layers():
        if moe.routing == "token":
            table = torch.zeros(len(loaded.languages.tasks(moe.task)), moe.experts, dtype=torch.float64)
            counts[side, layer] = table

            def count(module: Any, given: tuple[Any, ...], routes: Routes, table: torch.Tensor = table) -> None:
                places = (given[1][:, None] * table.shape[1] + routes.experts).flatten()
                table += torch.bincount(places.cpu(), minlength=table.numel()).view_as(table)

            hooks.append(_router(loaded, side, layer).register_forward_hook(count))
    table_of_ids = DirectionIds.of(loaded.languages, loaded.vocabulary)
    for number, direction in enumerate(loaded.languages.directions):
        pairs = data.tokens(direction, split)
        for start in range(0, min(len(pairs), ROUTED_SENTENCES), ROUTED_BATCH):
            indices = range(start, min(start + ROUTED_BATCH, len(pairs), ROUTED_SENTENCES))
            sources, targets = [pairs.source[i] for i in indices], [pairs.target[i] for i in indices]
            batch = collate(sources, targets, [number] * len(indices), table_of_ids).to(loaded.device)
            loaded.model(batch.source, batch.decoder_input, batch.labels, batch.ids)
    for hook in hooks:
        hook.remove()
    return counts
