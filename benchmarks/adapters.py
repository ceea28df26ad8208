"""Whether a model with low-rank matrices computes the same as all that `lsmoe convert` makes of it, adapters
for peft among it.

    python benchmarks/adapters.py [--corpus build/imports/data/corpora/django] [--work build/adapters]

Makes a random M2M-100 with the vocabulary of real text, as benchmarks/imports.py does, and adds random
matrices of English, German and French to all of its linear layers. In each of 2 directions 200 lines are
translated with beam 5 by the model itself, and by what it is converted to: the dense model with the matrices
merged, in torch and in CTranslate2, the same in transformers, and an adapter that peft loads on its base.
Counted are translations that equal the model's own, token by token; the largest difference of any logit is
taken along the model's own translations (CTranslate2 gives none).
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, run_main, write
from imports import KINDS, SIZES, corpus_of, make, text_of

from lsmoe_ds.checkpoint.stored import VOCABULARY, find_model, write_folder
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.peft import open_adapted
from lsmoe_ds.folders import read_json
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate_tokens
from lsmoe_ds.shipped import ROOT as PROJECT

DIRECTIONS = [Direction("en", "de"), Direction("fr", "en")]
RANKS = "{de: 8, en: 4, fr: 16}"
MODELS = {  # name: title, section of the recipe
    "pair": ("by pair, rank 8", "{rank: 8, at: all}"),
    "learned": (
        "learned, ranks 4 to 16, half pruned",
        f"{{rank: {RANKS}, index: learned, at: all, prune: {{ratio: 0.5, matrices: both}}}}",
    ),
}
DEVIATION = 0.15  # of the matrices


def add_matrices(base: Path, section: str, folder: Path) -> Path:
    """Write the model with random matrices and masks, and return its folder.

    They do not add to the values of a hidden state by which the model knows how long its translation is.
    """
    convert(base, "grown", None, folder / "grown", check=0, overrides=[f"model.low_rank={section}"])
    stored, tensors = find_model(folder / "grown"), dict(open_tensors(folder / "grown"))
    generator = torch.Generator().manual_seed(1)
    norm = tensors["decoder_norm.weight"]
    counts = norm == norm.max()
    for name in sorted(tensors):
        value = tensors[name]
        if name.endswith("_mask"):
            tensors[name] = torch.rand(value.shape, generator=generator) < 0.5
        elif "_low_rank." in name:
            value.normal_(0, 1 if name.endswith(".index") else DEVIATION, generator=generator)
            if name.endswith(".vertical") and value.shape[1] == len(counts):
                value[:, counts] = 0
    for name in tensors:
        if name.endswith("_mask"):
            tensors[name.removesuffix("_mask")] *= tensors[name]

    def entry(name: str, value: torch.Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), lambda: value, value.dtype, name.endswith("_mask"))

    made = read_json(folder / "grown" / "provenance.json") or {}
    provenance = {key: value for key, value in made.items() if key not in ("format", "files")}
    write_folder(
        folder / "whole",
        Tensors({name: entry(name, value) for name, value in tensors.items()}),
        stored.recipe,
        stored.home / VOCABULARY,
        provenance,
    )
    return folder / "whole"


def converted(whole: Path, direction: Direction, folder: Path) -> dict[str, Engine]:
    """Convert a model for a direction; return each form by name, as whoever uses it loads it."""
    for kind in ("dense", "huggingface", "ctranslate2", "peft"):
        convert(whole, kind, direction, folder / kind, check=0)
    return {
        "merged, torch": load(folder / "dense", "cpu"),
        "merged, transformers": Exported.load(find_model(folder / "huggingface")),
        "merged, CTranslate2": load_engine(folder / "ctranslate2"),
        "adapter, peft": open_adapted(find_model(folder / "peft"))(direction),
    }


def measure(name: str, base: Path, work: Path, text: dict[str, list[str]], count: int) -> dict[str, Any]:
    """Return the row of one choice of matrices; differences are the largest and counts the sums of all
    directions.
    """
    title, section = MODELS[name]
    whole = add_matrices(base, section, work)
    model = load(whole, "cpu")
    difference: dict[str, float | None] = {}
    same: dict[str, int] = {}
    of_base, distinct = 0, set()
    for direction in DIRECTIONS:
        lines = text[direction.source][:count]
        sources = [model.vocabulary.encode(line) for line in lines]
        own = [best.tokens for (best,) in translate_tokens(model, direction, sources, Search())]
        distinct |= {tuple(each) for each in own}
        folder = work / str(direction)
        for form, engine in converted(whole, direction, folder).items():
            found = compare(model, engine, direction, lines)
            assert found.sentences == len(lines)
            same[form] = same.get(form, 0) + found.same
            largest = found.largest_logit_difference
            difference[form] = None if largest is None else max(difference.get(form) or 0.0, largest)
        alone = Exported.load(find_model(folder / "peft" / "base"))
        of_base += compare(model, alone, direction, lines).same
        print(title, direction, same, difference, of_base, flush=True)
    return {
        "matrices": title,
        "lines": len(DIRECTIONS) * count,
        "largest logit difference": difference,
        "same translations": same,
        "same translations of the base alone": of_base,
        "distinct translations": len(distinct),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    about = "a folder that `lsmoe data fetch` made, with de-en.tsv and en-fr.tsv (default: django, fetched)"
    parser.add_argument("--corpus", type=Path, metavar="DIR", help=about)
    about = "where models are kept (default: build/adapters)"
    parser.add_argument(
        "--work", type=Path, default=PROJECT / "build" / "adapters", metavar="DIR", help=about
    )
    about = "of each direction (default: %(default)s)"
    parser.add_argument("--lines", type=int, default=200, metavar="N", help=about)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    corpus = corpus_of(arguments.corpus, work)
    text = text_of(corpus)
    make(KINDS["m2m_100"], work / "model", text)
    overrides = ["data.corpora=[none]", f"data.directions=[{','.join(map(str, DIRECTIONS))}]"]
    convert(work / "model", "consolidated", None, work / "imported", overrides=overrides)
    rows = {name: measure(name, work / "imported", work / name, text, arguments.lines) for name in MODELS}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "ctranslate2")}
    made = read_json(corpus / "PROVENANCE.json") or {}
    source = {key: made.get(key) for key in ("name", "package", "version")}
    write(
        {"versions": versions, "corpus": source, "beam": Search().beam, "sizes": SIZES, "rows": rows},
        arguments.out,
    )


if __name__ == "__main__":
    run_main(main)
