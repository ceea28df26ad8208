"""Analyze trained low-rank matrices ("Exploring Intrinsic Language-specific Subspaces", section 4).

Two questions: does each layer (or direction) give more weight to the source's or the target's matrices, and
how large a subspace does each language need?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.recipe import Recipe, Training
from lsmoe_ds.config.shapes import LinearShape, SideName, shapes_of
from lsmoe_ds.directions import GROUPS, Direction
from lsmoe_ds.languages import language_name
from lsmoe_ds.methods.findings import Findings, Grid
from lsmoe_ds.methods.low_rank.bank import FLAT, MASK, NAME, VERTICAL, rows_of
from lsmoe_ds.methods.low_rank.checks import names_of
from lsmoe_ds.methods.low_rank.masks import is_untrained
from lsmoe_ds.methods.low_rank.settings import Index, LowRank

SIDES: tuple[SideName, ...] = ("encoder", "decoder")
EQUAL = 0.5  # the initial value of both weights
ALIKE = 0.1  # layers whose weights of source and target differ by less are reported
SHORT = {
    **{"query": "q", "key": "k", "value": "v", "output": "o"},
    **{"gate": "gate", "expand": "fc1", "contract": "fc2"},
}


def linears_of(recipe: Recipe, section: LowRank) -> list[LinearShape]:
    """List the linear layers with matrices beside them."""
    return [site for site in shapes_of(recipe.model) if isinstance(site, LinearShape) and section.is_at(site)]


def structure(recipe: Recipe, section: LowRank, weights: Tensors) -> Findings:
    """Return the learned weights of source and target in each layer (figure 1), and a recipe.

    In that recipe each layer uses the index that has the larger weight. For modular LoRA this is
    :func:`merges`.
    """
    if section.is_modular:
        return merges(recipe, section, weights)
    learned: dict[tuple[SideName, int], tuple[float, float]] = {}
    for site in linears_of(recipe, section):
        if section.index_at(site) == "learned":
            source, target = weights[f"{site.side}_{NAME}.index"][site.layer].softmax(0).tolist()
            learned[site.side, site.layer] = (source, target)
    chosen: dict[tuple[SideName, int], Index] = {
        place: "source" if source > target else "target" for place, (source, target) in learned.items()
    }
    records = [
        {"side": side, "layer": layer, "source": source, "target": target, "chosen": chosen[side, layer]}
        for (side, layer), (source, target) in learned.items()
    ]
    grid = Grid(
        "weights",
        "Weights of the source's and the target's matrices",
        "In each layer both add to 1. Layers count from 1.",
        ("source", "target"),
        [f"{side} {layer + 1}" for side, layer in learned],
        [[each[k] for each in learned.values()] for k in (0, 1)],
        full=1.0,
    )
    index = _patterns(recipe, section, chosen)
    said = "; ".join(f"{name}: {', '.join(patterns)}" for name, patterns in index.items())
    alike = [f"{side}.{layer}" for (side, layer), both in learned.items() if abs(both[0] - both[1]) < ALIKE]
    if alike:
        said += f"; of nearly equal weights, which say little: {', '.join(alike)}"
    changed = section.model_copy(update={"index": index})
    model = recipe.model.model_copy(update={NAME: changed})
    training = _trains(recipe, section, changed)
    found = recipe.model_copy(
        update={"name": f"{recipe.name}-structured", "model": model, "training": training}
    )
    return Findings("Languages by which layers choose their matrices", said, records, [grid], found)


def _trains(recipe: Recipe, learned: LowRank, chosen: LowRank) -> Training:
    """Return the section ``training`` for the recipe with the ``chosen`` index.

    If a pattern of ``trainable`` names only matrices or weights that this recipe lacks, all its matrices
    replace it.
    """
    training = recipe.training
    if not isinstance(training.trainable, list):
        return training

    def named(section: LowRank, patterns: Iterable[str]) -> list[str]:
        names = [*names_of(section, recipe.model, (FLAT, VERTICAL))]
        names += [f"{side}_{NAME}.index" for side in SIDES if section.learns(recipe.model, side)]
        return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]

    before = named(learned, training.trainable)
    gone = set(before) - set(named(chosen, before))
    kept = [pattern for pattern in training.trainable if pattern not in gone]
    return training.model_copy(update={"trainable": [*kept, f"*_{NAME}.*"]}) if gone else training


def merges(recipe: Recipe, section: LowRank, weights: Tensors) -> Findings:
    """Return the learned weights w_in, w_out of each direction in each layer (figure 2 of "Towards Modular
    Fine-tuning of LLM-based Multilingual Neural Machine Translation").

    Leaves out directions that this recipe does not train and whose two weights are equal: they were never
    trained.
    """
    layers = list(dict.fromkeys((site.side, site.layer) for site in linears_of(recipe, section)))
    index = {side: weights[f"{side}_{NAME}.index"] for side in dict.fromkeys(side for side, _ in layers)}
    shares: dict[Direction, list[tuple[float, float]]] = {}
    for number, direction in enumerate(recipe.languages.directions):
        own = [index[side][number, layer] for side, layer in layers]
        if direction in recipe.trained or any(first != second for first, second in own):
            shares[direction] = [(w_in, w_out) for w_in, w_out in (each.softmax(0).tolist() for each in own)]
    records = [
        {"direction": str(direction), "side": side, "layer": layer, "in": w_in, "out": w_out}
        for direction, own in shares.items()
        for (side, layer), (w_in, w_out) in zip(layers, own, strict=True)
    ]
    names = [f"{language_name(each.source)} to {language_name(each.target)}" for each in shares]
    outs = [[w_out for _, w_out in own] for own in shares.values()]
    most = max((abs(share - EQUAL) for own in outs for share in own), default=0.0)
    grid = Grid(
        "weights",
        "Weights of the target's matrices as output",
        "Those of the source's matrices as input are the rest to 1. Blue: the target weighs more; red: the "
        f"source does. Full color is {EQUAL - most:.3f} or {EQUAL + most:.3f}. Layers count from 1.",
        names,
        [f"{side} {layer + 1}" if len(index) > 1 else f"{layer + 1}" for side, layer in layers],
        outs,
        middle=EQUAL,
    )
    means = {str(direction): sum(own) / len(own) for direction, own in zip(shares, outs, strict=True)}
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in sorted(means.items(), key=lambda each: -each[1]))
    said = f"mean weight of the target's matrices as output: {shown}"
    return Findings("Languages by which directions merge their matrices", said, records, [grid])


def _patterns(
    recipe: Recipe, section: LowRank, chosen: Mapping[tuple[SideName, int], Index]
) -> dict[Index, list[str]]:
    """Return ``index`` by patterns: ``{source: [encoder.0-8], target: [encoder.9-11, decoder.0-11]}``.

    Linear layers whose index is not learned keep it.
    """
    of: dict[LinearShape, Index] = {}
    for site in linears_of(recipe, section):
        index = section.index_at(site)
        if index == "language":
            index = "target" if site.side == "decoder" else "source"
        of[site] = chosen[site.side, site.layer] if index == "learned" else index
    layers: dict[tuple[SideName, int], set[Index]] = defaultdict(set)
    for site, index in of.items():
        layers[site.side, site.layer].add(index)
    found: dict[Index, list[str]] = {}
    for site, index in of.items():  # layers in which some linear layers have an index of their own
        if len(layers[site.side, site.layer]) > 1:
            name = site.sublayer if site.sublayer != "attention" else "self_attention"
            found.setdefault(index, []).append(f"{site.side}.{site.layer}.{name}.{site.name}")
    alike = [(side, next(iter(kinds)), layer) for (side, layer), kinds in layers.items() if len(kinds) == 1]
    for (side, index), several in groupby(alike, lambda each: each[:2]):
        for first, last in _ranges([layer for _, _, layer in several]):
            pattern = f"{side}.{first}" if first == last else f"{side}.{first}-{last}"
            found.setdefault(index, []).append(pattern)
    return found


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last of each sequence of consecutive numbers."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]


class Score(NamedTuple):
    """How much of a language's vertical matrix (B of LoRA) beside a linear layer was pruned (equation 5)."""

    site: LinearShape
    pair: str  # "source" or "target" in a layer with learned weights
    code: str
    size: int
    pruned: int
    ratio: float

    @property
    def score(self) -> float:
        """Score(B) = pruned - ratio x size: negative where a larger subspace is needed."""
        return self.pruned - self.ratio * self.size

    @property
    def column(self) -> str:
        """Name the linear layer as the paper's figures do: ``enc q``, ``dec c-q``, ``dec fc1``."""
        across = "c-" if self.site.sublayer == "cross_attention" else ""
        return f"{self.site.side[:3]} {across}{SHORT[self.site.name]}"


def scores(recipe: Recipe, section: LowRank, weights: Tensors) -> list[Score]:
    """Score each language's vertical matrix beside each linear layer by its mask.

    The ratio is the one reached so far, which before the end of the schedule is less than the recipe's.
    Matrices that were never trained are left out.
    """
    assert section.prune is not None
    found = []
    rows = dict(zip(recipe.languages.codes, rows_of(section, recipe.languages), strict=False))
    for site in linears_of(recipe, section):
        at = f"{site.side}.{site.layer}.{site.sublayer}.{site.name}_{NAME}."
        for choice in section.choices(site):
            name = f"{at}{choice.name}{'.' if choice.name else ''}{VERTICAL}"
            values, mask = weights[name], weights[f"{name}{MASK}"]
            for code, own in rows.items():
                part = mask[own]
                if (
                    own.start < own.stop
                    and section.prune.prunes(code, recipe.languages)
                    and not is_untrained(values[own], part)
                ):
                    pruned = part.numel() - int(part.count_nonzero())
                    found.append(Score(site, choice.name, code, part.numel(), pruned, 0.0))
    ratio = sum(each.pruned for each in found) / max(1, sum(each.size for each in found))
    return [each._replace(ratio=ratio) for each in found]


def subspaces(recipe: Recipe, section: LowRank, weights: Tensors) -> Findings:
    """Return the scores by language and linear layer.

    They are averaged over layers (figure 2) and over languages (figure 4), and given in each layer (figure 5)
    and for each language (figure 6). The means share one color scale, and the other grids another, so that
    their pictures can be compared. Grids show scores as shares of the size of B, since sizes differ; the
    records have both.
    """
    found = scores(recipe, section, weights)
    records = [
        {
            "language": each.code,
            "group": recipe.languages.groups.get(each.code, ""),
            "side": each.site.side,
            "layer": each.site.layer,
            "sublayer": each.site.sublayer,
            "linear": each.site.name,
            "index": each.pair,
            "size": each.size,
            "pruned": each.pruned,
            "score": round(each.score, 6),
            "share": round(each.score / each.size, 6),
        }
        for each in found
    ]
    groups = recipe.languages.groups
    codes = sorted(
        dict.fromkeys(each.code for each in found),
        key=lambda code: (GROUPS.index(groups[code]) if code in groups else 0, code),
    )
    columns = list(dict.fromkeys(each.column for each in found))
    layers = list(dict.fromkeys((each.site.side, each.site.layer) for each in found))

    def named(code: str) -> str:
        return (
            f"{language_name(code)} ({groups[code].replace('_', ' ')})"
            if code in groups
            else language_name(code)
        )

    def grid(
        name: str,
        title: str,
        about: str,
        rows: Mapping[str, object],
        row_of: Callable[[Score], object],
        among: Iterable[Score],
    ) -> Grid:
        cells: dict[tuple[object, str], list[float]] = defaultdict(list)
        for each in among:
            cells[row_of(each), each.column].append(each.score / each.size)
        used = [column for column in columns if any((row, column) in cells for row in rows.values())]
        values = [[_mean(cells.get((row, column))) for column in used] for row in rows.values()]
        return Grid(name, title, about, list(rows), used, values, signed=True)

    languages = {named(code): code for code in codes}
    about = (
        "Share of a language's B that was pruned, minus the ratio of pruning, in percentage points. "
        "Red: it kept more than others, and needs a larger subspace; blue: a smaller one does."
    )
    of_layers = {f"{side} {layer + 1}": (side, layer) for side, layer in layers}
    grids = [
        grid("languages", "Languages, mean over layers", about, languages, lambda each: each.code, found),
        grid(
            "layers",
            "Layers, mean over languages",
            about,
            of_layers,
            lambda each: (each.site.side, each.site.layer),
            found,
        ),
    ]
    for name, place in of_layers.items():
        among = [each for each in found if (each.site.side, each.site.layer) == place]
        grids.append(
            grid(
                f"layer-{name.replace(' ', '-')}",
                f"Languages in {name}",
                "",
                languages,
                lambda each: each.code,
                among,
            )
        )
    for name, code in languages.items():
        among = [each for each in found if each.code == code]
        grids.append(
            grid(
                f"language-{code}",
                f"Layers for {name}",
                "",
                of_layers,
                lambda each: (each.site.side, each.site.layer),
                among,
            )
        )
    means = 2
    grids = [*_on_one_scale(grids[:means]), *_on_one_scale(grids[means:])]
    total: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    for each in found:
        total[each.code] += each.score
        size[each.code] += each.size
    order = sorted(codes, key=lambda code: total[code] / size[code])
    shown = ", ".join(f"{code} {total[code] / size[code]:+.1%}" for code in order)
    said = f"from the largest subspace needed to the smallest, by what was pruned beyond the ratio: {shown}"
    if len({f"{total[code] / size[code]:.1%}".strip("-") for code in order}) == 1:
        said = (
            "as much was pruned of each language: languages compete under 'prune.over: layer', and the "
            "layers of a language under 'over: language'"
        )
    return Findings("Subspaces that languages need", said, records, grids)


def _on_one_scale(grids: Sequence[Grid]) -> list[Grid]:
    """Return the grids on one color scale: the largest value of all of them has full color."""
    values = (abs(value) for grid in grids for row in grid.values for value in row if value is not None)
    full = max(values, default=0.0)
    return [replace(grid, full=full) for grid in grids]


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def why_not(kind: str, recipe: Recipe, section: LowRank, weights: Tensors) -> str | None:
    """Explain why an analysis ("structure" or "subspaces") cannot run on a model; None if it can."""
    if kind == "structure" and section.is_modular:
        return None if section.merge else "its weights are not learned: train with 'low_rank.merge: learned'"
    if kind == "structure":
        learned = any(section.index_at(site) == "learned" for site in linears_of(recipe, section))
        return None if learned else "no layer of it learns its index: train with 'low_rank.index: learned'"
    if section.prune is None:
        return "nothing of it is pruned: train with 'low_rank.prune'"
    if not all(weights[name].all() for name in weights if name.endswith(f"{VERTICAL}{MASK}")):
        return None
    return (
        "none of its vertical matrices is pruned yet: 'low_rank.prune.start' is still ahead, or "
        "'training.trainable' does not train them"
    )


ANALYSES: dict[str, Callable[[Recipe, LowRank, Tensors], Findings]] = {
    "structure": structure,
    "subspaces": subspaces,
}
