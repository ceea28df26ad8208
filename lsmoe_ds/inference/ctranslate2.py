"""Translating with CTranslate2: a beam search that finds what ours finds.

Both finish the candidates of a beam that end in EOS, replace them by the next best that do not, and stop a sentence when
``beam`` hypotheses are finished. What must be set for that: EOS counts in the length by which scores are divided, which
CTranslate2 leaves out unless it returns EOS; ``coverage_penalty`` is 0 and ``patience`` 1; an EOS comes first in no translation
(``min_decoding_length`` 1); and a length penalty of 0 is given as next to nothing, since for 0 a sentence is stopped when its
best candidate ends, however many have. Two differences remain. Tokens that are never generated are taken out before the softmax, not
after, so their share of the probability goes to the others; in a trained model it is small. And the greatest length is one
for the whole batch (its longest source's), where a hypothesis that has not ended is cut, not made to end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.config import Recipe
from lsmoe_ds.convert.ctranslate2 import PIECES, library
from lsmoe_ds.convert.folder import PROVENANCE, Stored
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_json
from lsmoe_ds.inference.beam_search import NOT_FINITE, Hypothesis, Search, never_generated
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.model.guide import Route


@dataclass(frozen=True)
class CTranslate2:
    """A model in CTranslate2, on the GPU if that library finds one. ``pieces`` has the token of each id."""

    translator: Any
    pieces: list[str]
    recipe: Recipe
    vocabulary: Vocabulary
    languages: Languages
    step: int
    home: Path
    route: Route = "specific"

    @classmethod
    def load(cls, stored: Stored, route: Route) -> CTranslate2:
        """A folder that was converted to CTranslate2. Raises UserError if it is damaged."""
        provenance = read_json(stored.home / PROVENANCE) or {}
        try:
            step, wrong = int(provenance["step"]), damage(stored.home, provenance["files"], verify=True)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{stored.home} is damaged: {PROVENANCE} lacks {error}") from None
        if wrong is not None:
            raise UserError(f"{stored.home} is damaged: {wrong}")
        return cls.open(stored.home, stored.recipe, stored.vocabulary, step, stored.home, route)

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, vocabulary: Path, step: int, home: Path, route: Route = "specific") -> CTranslate2:
        """Loads the files that :func:`lsmoe_ds.convert.ctranslate2.write_files` wrote into ``folder``, which may go afterwards."""
        module = library()
        device = "cuda" if module.get_cuda_device_count() else "cpu"
        translator = module.Translator(str(folder), device=device, intra_threads=torch.get_num_threads())
        pieces = json.loads((folder / PIECES).read_text(encoding="utf-8"))
        return cls(translator, pieces, recipe, Vocabulary.load(vocabulary), recipe.languages, step, home, route)

    def search(self, sources: Sequence[Sequence[int]], direction: Direction, search: Search) -> list[Hypothesis]:
        """See :class:`lsmoe_ds.inference.engine.Engine`."""
        self.languages.direction_id(direction)
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        tag = self.vocabulary.tag_id(direction.target)
        limit = int(search.limits(torch.tensor([len(source) + 2 for source in sources])).max())
        results = self.translator.translate_batch(
            [[self.pieces[index] for index in (tag, *source)] for source in sources],
            beam_size=search.beam,
            length_penalty=search.length_penalty or 1e-9,
            max_input_length=0,
            max_decoding_length=limit + 1,
            suppress_sequences=[[self.pieces[index]] for index in never_generated(self.vocabulary)],
            return_end_token=True,
            return_scores=True,
        )
        if not all(math.isfinite(result.scores[0]) for result in results):
            raise UserError(NOT_FINITE)
        # The last token is EOS, or at the greatest length what stands in its place.
        return [Hypothesis([ids[piece] for piece in result.hypotheses[0][:-1]], result.scores[0]) for result in results]
