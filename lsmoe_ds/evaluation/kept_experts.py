"""``lsmoe analyze experts``: score a direction with fewer and fewer of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.analysis.command import check_out
from lsmoe_ds.analysis.findings import FORMAT, write_findings
from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.stored import Weights, find_model, read_weights
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.console import progress
from lsmoe_ds.data.held_out import HELD_OUT
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import make_metrics, score_corpus
from lsmoe_ds.export.kept_experts import Keep, keep_used
from lsmoe_ds.export.subnetwork import check_convertible, extract
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import Loaded, build_model, known_direction, load
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.methods.findings import Curve, Findings

KIND = "experts"


def analyze_experts(
    run: str | Path,
    direction: Direction,
    out: str | Path,
    split: str = "dev",
    limit: int | None = None,
    keep: Sequence[int] = (),
    beam: int = 5,
) -> dict[str, Any]:
    """Score a direction on up to ``limit`` held-out sentences with only its most used experts, and return
    ``summary.json``.

    ``keep`` are numbers of experts a layer; by default all, half of them, and so on. The models are those of
    ``lsmoe convert --as hybrid --keep N``. Raises UserError for a model without layers that route by token or
    sentence, for a direction without text, and if ``out`` holds files that were not written here.
    """
    if split not in HELD_OUT:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(HELD_OUT)}")
    check_out(Path(out), FORMAT)
    stored = find_model(run)
    direction = known_direction(stored.recipe, stored.kind, direction)
    check_convertible(stored.recipe, direction, hybrid=True)
    data = open_data(stored)
    sources, targets = (side[:limit] for side in data.text(direction, split))
    if not sources:
        raise UserError(f"{direction} has no {split} text in {data.folder}, which is to be translated")
    whole = read_weights(stored)
    uses = measure_use(load(stored.weights_in, "cpu", streamed=True), data, direction)
    weights, recipe = extract(whole.tensors, stored.recipe, direction, hybrid=True)
    numbers = sorted({*keep} or {*_halves(recipe)}, reverse=True)
    models = {number: keep_used(weights, recipe, uses, Keep(number)) for number in numbers}
    records, metrics = [], make_metrics(direction.target)
    vocabulary = Vocabulary.load(stored.vocabulary)
    with progress("translating", len(numbers) * len(sources)) as advance:
        for number, (kept, fewer, said) in models.items():
            model = build_model(fewer, vocabulary.size, Weights(kept, whole.step, {}), torch.device("cpu"))
            engine = Loaded(model, fewer, vocabulary, fewer.languages, whole.step, "hybrid", stored.home)
            lines = translate_all(engine, direction, sources, Search(beam), advance=advance)
            scores = score_corpus(metrics, lines, [targets]).values
            covered = min(each["least_use"] for each in said.values())
            sizes = {"kept": number, "parameters": kept.numbers, "use": covered}
            records.append({**sizes, **{name: round(score, 2) for name, score in scores.items()}})
    found = _findings(direction, records, split, len(sources))
    return write_findings(Path(out), KIND, stored.recipe.name, whole.step, found)


def _halves(recipe: Recipe) -> list[int]:
    """Return the largest number of experts of a layer, half of it and so on, but no fewer than tokens use."""
    layers = [moe for _, _, moe in recipe.model.moe_layers()]
    number, least = max(moe.experts for moe in layers), max(moe.top_k for moe in layers)
    found = [number]
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _findings(
    direction: Direction, records: Sequence[dict[str, Any]], split: str, sentences: int
) -> Findings:
    points = [(each["parameters"] / 1e6, each["chrfpp"], f"{each['kept']}") for each in records]
    curve = Curve(
        "experts",
        f"{direction.label} with fewer experts",
        f"chrF++ on {sentences:,} {split} sentences. The points say how many experts of each layer are kept.",
        "million parameters",
        "chrF++",
        points,
    )
    said = "; ".join(
        f"{each['kept']} experts: chrF++ {each['chrfpp']:.1f}, {each['parameters'] / 1e6:,.1f}M parameters, "
        f"{each['use']:.0%} of the use in each layer"
        for each in records
    )
    return Findings(f"Experts that {direction.label} needs", said, records, [curve])
