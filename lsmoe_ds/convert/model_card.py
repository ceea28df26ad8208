"""Write the model card of a converted folder, ``README.md``: the model, its training data, scores and use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lsmoe_ds.checkpoint.averages import describe_average
from lsmoe_ds.checkpoint.stored import PROVENANCE, VOCABULARY
from lsmoe_ds.config.host import Task
from lsmoe_ds.config.host_origin import origin_of
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert import adapter_card, encoder_card, host_card
from lsmoe_ds.convert.training_text import TrainingText
from lsmoe_ds.convert.uses import CLEAN, MENDED, USES
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.evaluation.score_folder import ScoreFolder
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.huggingface import class_of
from lsmoe_ds.export.their_tokenizer import style_of
from lsmoe_ds.folders import read_json
from lsmoe_ds.languages import language_name, tag
from lsmoe_ds.notices import counted, listed

IMPORTED = """The model `{imported_from}` of Hugging Face in the form of lsmoe_ds {version}: it translates as it did there, and a training
begins with it by `training.start_from`."""
GROWN = """The model `{grown_from}` with further experts, languages or matrices, made with lsmoe_ds {version}: a base for training, which
begins with it by `training.start_from`."""
WHOLE = "The whole model `{run}` as it was trained, written with lsmoe_ds {version}."
HYBRID = """What the model `{run}` uses {of}, extracted with lsmoe_ds {version}. Layers that choose their experts token by
token or sentence by sentence keep them all; the others are dense. It computes what that model computes {of}."""
PRUNED = """What of the model `{run}` this direction uses, extracted with lsmoe_ds {version}. Layers that choose their experts token by
token or sentence by sentence keep those that the direction's dev text uses most: it translates much as that model does, not exactly
alike; the others are dense."""
APPROXIMATE = """A dense Transformer made of the model `{run}` with lsmoe_ds {version}, in which {approximates}: it does not
compute what that model computes, and is a start for training."""
DENSE = """A dense Transformer extracted from the model `{run}` with lsmoe_ds {version}: it
computes what that model computes {of}."""
FLOAT = "float32"
ROUNDED = """A dense Transformer extracted from the model `{run}` with lsmoe_ds {version}, with weights rounded to
{quantization}: it computes what that model computes {of}, but for the rounding, which changes some translations."""

CARD = """---
language: [{% for code in codes %}"{{ code }}"{{ ", " if not loop.last }}{% endfor %}]
pipeline_tag: {{ pipeline }}
{%- if kind == 'huggingface' %}
library_name: transformers
{%- elif kind == 'peft' %}
library_name: peft
{%- endif %}
tags: [{{ pipeline }}, {{ kind }}]
{%- if base %}
base_model: {{ base|tojson }}
{%- endif %}
---

# {{ provenance.run }}, {{ 'all ' ~ unit ~ 's' if directions|length > 1 else directions[0].label }}

{{ does }} {{ names }}. {{ what }}

| | |
|---|---|
{%- for name, value in facts %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Training data

{% for line in text -%}
- {{ line }}
{% endfor %}
The license of the model is not stated here: whoever publishes it decides it, with regard to the licenses of
{{- " its base model and" if base }} its data.

## Scores

{% if scores -%}
{{ question }}{{ remarks }}

| {{ scores.scoring.unit }} | {% for title in metrics.values() %}{{ title }} | {% endfor %}{{ scores.scoring.item }}s |
|---|{% for _ in metrics %}---:|{% endfor %}---:|
{%- for score in scored %}
| {{ score.direction.label }} | {% for name in metrics %}{{ "%.1f"|format(score.metrics[name]) }} | {% endfor %}{{ score.sentences }} |
{%- endfor %}
{%- if signatures %}

{{ signatures|join('; ') }}
{%- endif %}
{%- else -%}
None are known: `lsmoe evaluate` on the run writes them.
{%- endif %}

## Use

{{ use }}
"""


# The Hub's name of each task, and what a model for it does.
DOES: dict[Task, tuple[str, str]] = {
    "translate": ("translation", "Translates"),
    "tag": ("token-classification", "Finds names in text in"),
    "answer": ("question-answering", "Finds the answers to questions in text in"),
}
MOST_NAMED = 12  # directions named in the first sentence


def model_card(
    kind: str,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    home: Path,
    adapters: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the card's text. ``recipe`` is the dense model's; ``home`` is the run's folder with the
    vocabulary and perhaps scores. ``adapters`` are the sizes of the adapters of the kind ``peft``.
    """
    environment = Environment(autoescape=False, keep_trailing_newline=True)  # Markdown, not HTML
    directions = recipe.languages.directions
    of = "for this direction" if len(directions) == 1 else "for each of these directions"
    targets = list(dict.fromkeys(direction.target for direction in directions))
    words: dict[str, Any] = {
        "targets": targets,
        "tags": [tag(code) for code in targets],
        "clean": CLEAN.rstrip(),
    }
    words |= {"class": class_of(recipe.model), "mended": MENDED if any(recipe.model.moe_layers()) else ""}
    given = recipe.data.tags == "source-target"
    theirs = given and kind in ("huggingface", "peft") and recipe.model.huggingface is None
    style = style_of(Vocabulary.load(home / VOCABULARY), recipe) if theirs else None
    last = next(direction for direction in directions if direction.target == targets[-1])
    if adapters:
        words |= adapter_card.words(adapters, given, provenance)
    uses = USES
    if recipe.model.task != "translate":
        uses = USES | encoder_card.uses(recipe.model.task)
        words |= encoder_card.words(recipe)
    elif recipe.model.huggingface is not None and kind in host_card.USES:
        uses = USES | host_card.USES
        named = [Direction.parse(row["directions"][0]) for row in adapters if row["ranks"]]
        words |= host_card.words(recipe, Vocabulary.load(home / VOCABULARY), [*named, *directions][0])
    use = environment.from_string(uses[kind]).render(
        first=directions[0],
        last=last,
        given=given,
        style=style,
        maps=provenance.get("vocabulary_map", {}).get("mapped") == str(directions[0]),
        **words,
    )
    pipeline, does = DOES[recipe.model.task]
    text = TrainingText.of(recipe, provenance, home)
    scores = _scores(home, directions, provenance)
    scored = [score for score in scores.directions if score.direction in directions] if scores else []
    metrics = (
        {name: title for name, title in scores.scoring.titles.items() if name != "chrf"} if scores else {}
    )
    return environment.from_string(CARD).render(
        kind=kind,
        pipeline=pipeline,
        does=does,
        unit=TASKS[recipe.model.task].unit,
        provenance=provenance,
        what=_what(kind, recipe, provenance).format(
            **provenance,
            of="by what all languages share" if provenance["route"] == "shared" else of,
        ),
        codes=sorted({code.split("_")[0] for code in recipe.languages.codes}),
        directions=directions,
        remarks=_remarks(scores, provenance, home),
        names=_names(directions),
        base=None if recipe.model.huggingface is None else origin_of(recipe.model.huggingface).name,
        facts=[*_facts(kind, recipe, provenance), *text.facts(recipe, provenance)],
        text=text.lines(),
        scores=scores if scored else None,
        question=replace(scores, directions=tuple(scored)).describe(directions) if scores else "",
        scored=scored,
        metrics=metrics,
        signatures=list(
            dict.fromkeys(s.signatures[name] for s in scored for name in metrics if name in s.signatures)
        ),
        use=use,
    )


def _what(kind: str, recipe: Recipe, provenance: Mapping[str, Any]) -> str:
    if kind == "peft":
        return adapter_card.WHAT
    if kind == "consolidated" and ("imported_from" in provenance or "grown_from" in provenance):
        return IMPORTED if "imported_from" in provenance else GROWN
    if "approximates" in provenance:
        return APPROXIMATE
    if any(each["kept"] < each["of"] for each in provenance.get("kept_experts", {}).values()):
        return PRUNED
    if kind == "consolidated" and provenance["dense_parameters"] == provenance["sparse_parameters"]:
        return WHOLE
    if any(recipe.model.moe_layers()):
        return HYBRID
    return ROUNDED if provenance.get("quantization", FLOAT) != FLOAT else DENSE


def _remarks(scores: ScoreTable | None, provenance: Mapping[str, Any], home: Path) -> str:
    """Describe the differences between the scored model, which is in ``home``, and this one."""
    remarks, scored = [], read_json(home / PROVENANCE) or {}
    if scores is not None and scores.step != provenance["step"]:
        remarks.append(f" They are of another step than this model, which is of step {provenance['step']:,}.")
    if provenance.get("quantization", FLOAT) != FLOAT:
        remarks.append(" They are of the model before its weights were rounded.")
    before, kept = scored.get("kept_experts", {}), provenance.get("kept_experts", {})
    pruned = any(each["kept"] < each["of"] and each != before.get(side) for side, each in kept.items())
    if pruned or provenance.get("approximates") not in (None, scored.get("approximates")):
        remarks.append(" They are of the model before experts were removed from it.")
    if "vocabulary_map" in provenance:
        remarks.append(" They are of a search without vocabulary map.")
    return "".join(remarks)


def _names(directions: tuple[Direction, ...]) -> str:
    alone = all(direction.alone for direction in directions)
    if len(directions) > MOST_NAMED:
        return f"{len(directions)} languages" if alone else f"in {len(directions)} directions"
    if alone:
        return listed(language_name(direction.source) for direction in directions)
    return ", ".join(
        f"{language_name(direction.source)} to {language_name(direction.target)}" for direction in directions
    )


def _facts(kind: str, recipe: Recipe, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = recipe.model
    yield "format", ", ".join([kind, *([provenance["quantization"]] if "quantization" in provenance else [])])
    labels = (direction.label for direction in recipe.languages.directions)
    yield TASKS[model.task].unit, ", ".join(labels)
    yield "route", provenance["route"]
    if (mapped := provenance.get("vocabulary_map")) is not None:
        of_a_piece, of_a_sentence = mapped["candidates_of_a_piece"], mapped.get("candidates_of_a_sentence")
        measured = (
            f"; a held-out sentence has {of_a_sentence:,} candidates, among which are "
            f"{mapped['references_covered']} % of the pieces of its reference"
            if of_a_sentence is not None
            else ""
        )
        yield (
            "vocabulary map",
            f"{of_a_piece} candidates for each piece of a source, of {mapped['mapped']} alone{measured}",
        )
    later = {"grown_from": " before it was grown", "approximates": " before they were joined"}
    when = next((words for key, words in later.items() if key in provenance), "")
    for side, each in provenance.get("kept_experts", {}).items():
        yield f"experts of the {side}{when}", _kept(each)
    if "merged" in provenance:
        yield "merged into its layers", provenance["merged"]
    average = provenance.get("average", 1)
    averaged = f", {describe_average(average)} up to it" if average != 1 else ""
    yield "trained steps", f"{provenance['step']:,}{averaged}"
    before = (
        ""
        if provenance["dense_parameters"] == provenance["sparse_parameters"]
        else f"{provenance['sparse_parameters']:,}"
    )
    whole = f" ({'before' if 'grown_from' in provenance else 'the whole model'}: {before})" if before else ""
    padded, dense = provenance.get("padded_parameters"), provenance["dense_parameters"]
    and_experts = " and one number of experts" if any(model.moe_layers()) else ""
    zeros = (
        f"; {padded:,} in this folder, filled up to one width a side{and_experts}"
        if padded not in (None, dense)
        else ""
    )
    yield "parameters", f"{dense:,}{whole}{zeros}"
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        if not side.layers:
            continue  # a decoder alone
        widths = sorted({side.width(layer) for layer in range(side.layers)})
        experts = ""
        if side.moe is not None:
            every = "layer" if side.moe.every == 1 else counted(side.moe.every, "layer")
            experts = f", {counted(side.moe.experts, 'expert')} by {side.moe.routing} every {every}"
        yield name, f"{counted(side.layers, 'layer')}, feed-forward {' and '.join(map(str, widths))}{experts}"
    yield "hidden size, heads", f"{model.hidden}, {model.heads}"
    yield "vocabulary", f"{recipe.data.vocabulary.size:,} pieces ({recipe.data.vocabulary.type})"
    yield "longest source", f"{recipe.data.batch.max_length} tokens"


def _kept(pruning: Mapping[str, Any]) -> str:
    """Describe the experts that a pruning kept, and those that earlier prunings of the model kept."""
    use = f"{pruning['least_use']:.1%} of the use or more"
    before = f"; before that, {_kept(pruning['before'])}" if "before" in pruning else ""
    return f"{pruning['kept']} of {pruning['of']} in each layer, with {use}{before}"


def _scores(home: Path, directions: Sequence[Direction], provenance: Mapping[str, Any]) -> ScoreTable | None:
    """Find the fullest scores of these directions for the model's route and weights; None if none are
    readable.
    """
    route, step, average = provenance["route"], provenance["step"], provenance.get("average", 1)
    try:
        return ScoreFolder(home).best(directions, route, step, average)
    except UserError:
        return None
