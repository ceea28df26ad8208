"""Choose how examples become batches: pairs with tags or in prompts, or text with labels."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.data import Data
from lsmoe_ds.data.batches import DirectionIds, Form
from lsmoe_ds.data.labels import Labels
from lsmoe_ds.data.prompts import Prompts
from lsmoe_ds.directions import Languages


def form_of(data: Data, languages: Languages, vocabulary: Any) -> Form:
    """Return the form of the batches. Raises UserError if the vocabulary lacks what it needs."""
    if data.task != "translate":
        return Labels.of(data, languages, vocabulary)
    if data.prompt is not None:
        return Prompts.of(languages, vocabulary, data.prompt)
    return DirectionIds.of(languages, vocabulary, data.tags)
