"""``lsmoe analyze neurons``: find the hidden units that each direction activates, and compare directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lsmoe_ds.analysis.command import check_out
from lsmoe_ds.analysis.findings import FORMAT, write_findings
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

if TYPE_CHECKING:
    from torch import Tensor

    from lsmoe_ds.inference.load import Loaded

KIND = "neurons"


def analyze_neurons(
    run: str | Path,
    out: str | Path,
    split: str = "dev",
    share: float = 95.0,
    per: Literal["sentence", "token"] = "sentence",
    limit: int | None = None,
) -> dict[str, Any]:
    """Record the activations of the units of all feed-forwards and experts on held-out text, and compare the
    most active ones of directions.

    ``share``, ``per`` and ``limit`` are ``share``, ``per`` and ``pairs`` of ``model.neurons``; the units of
    all experts of a layer are chosen together. Returns ``summary.json``. Raises UserError for a model of one
    direction, for a split without text, and if ``out`` holds files that were not written here.
    """
    # These import torch.
    from lsmoe_ds.data.held_out import HELD_OUT
    from lsmoe_ds.inference.load import load
    from lsmoe_ds.methods.neurons.analysis import find_overlaps
    from lsmoe_ds.methods.neurons.selection import most_active

    if split not in HELD_OUT:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(HELD_OUT)}")
    if not 0 <= share <= 100:
        raise UserError(f"--share is {share:g}: give a percentage from 0 to 100")
    check_out(Path(out), FORMAT)
    loaded = load(run)
    counts, left, sentences = record_all(loaded, split, per, limit)
    read = [i for i, count in enumerate(sentences.tolist()) if count]
    if len(read) < 2:
        have = counted(len(read), "direction")
        raise UserError(f"{run} has {have} with {split} text: it takes two to compare")
    masks = {name: most_active(each[read], share) & left[name][read] for name, each in counts.items()}
    directions = [loaded.languages.directions[i] for i in read]
    units = (
        f"the units that have {share:g} % of the activations, counted by {per} in {int(sentences.sum()):,} "
        f"{split} sentences"
    )
    found = find_overlaps(directions, masks, units)
    return write_findings(Path(out), KIND, loaded.recipe.name, loaded.step, found)


def record_all(
    loaded: Loaded, split: str, per: Literal["sentence", "token"], limit: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the activations of units [D, units] by layer (``encoder.0``), with experts concatenated; masks
    of the units that are kept, in the same shapes; and the number of sentences of each direction.

    A unit that a mask removes counts as inactive, although it may still output relu of its bias.
    """
    import torch

    from lsmoe_ds.data.batches import PairBatch
    from lsmoe_ds.data.forms import form_of
    from lsmoe_ds.data.prepared import open_data
    from lsmoe_ds.data.validation import validation_batches
    from lsmoe_ds.methods.neurons.method import NeuronSpecialization
    from lsmoe_ds.methods.neurons.recording import Recorder, observed
    from lsmoe_ds.model.transformer import Transformer

    if not isinstance(loaded.model, Transformer):
        raise UserError(
            f"{loaded.home} is a model of transformers: 'analyze neurons' knows the units of our own alone"
        )
    recipe, data = loaded.recipe, open_data(loaded)
    languages, form = loaded.languages, form_of(recipe.data, loaded.languages, loaded.vocabulary)
    batches = validation_batches(
        data, languages, loaded.vocabulary, recipe.data.batch, split=split, limit=limit, form=form
    )
    recorder = Recorder(loaded.model, len(languages.directions), per, torch.device(loaded.device))
    with observed(recorder, experts=True):
        for batch in batches:
            assert isinstance(batch, PairBatch)
            recorder.read(batch.to(loaded.device))
    left = {at: torch.ones_like(each, dtype=torch.bool) for at, each in recorder.counts.items()}
    for method in loaded.model.methods:
        if isinstance(method, NeuronSpecialization):
            left |= {at: module.mask for at, module in method.masks.items() if at in left}
    counts = {at: each * left[at] for at, each in recorder.counts.items()}
    of_layers = ({name: each.cpu() for name, each in by_layer(of).items()} for of in (counts, left))
    return *of_layers, recorder.sentences.cpu()  # type: ignore[return-value]


def by_layer(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the units of each layer, in the order of layers and of experts."""
    import torch

    def place(at: str) -> tuple[bool, list[int]]:
        return not at.startswith("encoder"), [int(number) for number in re.findall(r"\d+", at)]

    parts: dict[str, list[Tensor]] = {}
    for at in sorted(counts, key=place):
        parts.setdefault(".".join(at.split(".")[:2]), []).append(counts[at])
    return {name: torch.cat(each, 1) for name, each in parts.items()}
