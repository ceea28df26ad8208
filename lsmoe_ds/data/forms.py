"""Choose how sentence pairs become batches: with tags for an encoder-decoder, or in prompts for a language
model.
"""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.data import Prompt, TagConvention
from lsmoe_ds.data.batches import DirectionIds, Form
from lsmoe_ds.data.prompts import Prompts
from lsmoe_ds.languages import Languages


def form_of(
    languages: Languages, vocabulary: Any, tags: TagConvention = "target", prompt: Prompt | None = None
) -> Form:
    """Return the form of the batches. Raises UserError if the vocabulary lacks what it needs."""
    if prompt is not None:
        return Prompts.of(languages, vocabulary, prompt)
    return DirectionIds.of(languages, vocabulary, tags)
