"""Translate with CTranslate2: a beam search that finds what ours finds.

Both finish the candidates of a beam that end in EOS, replace them by the next best that do not, and stop a
sentence when ``beam`` hypotheses are finished. What must be set for that: EOS counts in the length by which
scores are divided, which CTranslate2 leaves out unless it returns EOS; ``coverage_penalty`` is 0 and
``patience`` 1; an EOS comes first in no translation (``min_decoding_length`` 1); and a length penalty of 0 is
given as next to nothing, since for 0 a sentence is stopped when its best candidate ends, however many have.

In CTranslate2 one greatest length holds for the whole batch (its longest source's), where a hypothesis that
has not ended is cut, not made to end. A sentence that went beyond its own greatest length is therefore
searched again, up to that, and what was cut there gets its end, with the probability it has. Two small
differences from our search remain: in the probability of such an end the tokens that are never generated have
a share, and CTranslate2 returns of what was cut only as much as the beam has room for.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.checkpoint.stored import PROVENANCE, Stored
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import SPECIALS, Vocabulary
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_fields
from lsmoe_ds.inference.beam_search import NOT_FINITE, Hypothesis, Search, never_generated
from lsmoe_ds.languages import EOS
from lsmoe_ds.methods.context import Route

END = SPECIALS[EOS]
PIECES = "shared_vocabulary.json"
MAP = "vmap.txt"  # a vocabulary map, by CTranslate2's own name
Scored = tuple[list[str], float]  # pieces, with their end if they have ended, and their score


def library() -> Any:
    """Import the module. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("ctranslate2")
    except ImportError:
        raise UserError("CTranslate2 is not installed: pip install ctranslate2") from None


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
    mapped: Direction | None = None  # in which only candidates of a vocabulary map are scored

    @classmethod
    def load(cls, stored: Stored, route: Route) -> CTranslate2:
        """Load a folder that was converted to CTranslate2. Raises UserError if it is damaged."""
        provenance = read_fields(stored.home / PROVENANCE, step=int, files=dict)
        if wrong := damage(stored.home, provenance["files"], verify=True):
            raise UserError(f"{stored.home} is damaged: {wrong}")
        mapped = provenance.get("vocabulary_map", {}).get("mapped")
        return cls.open(
            stored.home,
            stored.recipe,
            stored.vocabulary,
            provenance["step"],
            stored.home,
            route,
            Direction.parse(mapped) if mapped else None,
        )

    @classmethod
    def open(
        cls,
        folder: Path,
        recipe: Recipe,
        vocabulary: Path,
        step: int,
        home: Path,
        route: Route = "specific",
        mapped: Direction | None = None,
    ) -> CTranslate2:
        """Load the files that :func:`lsmoe_ds.export.ctranslate2.write_files` wrote into ``folder``, which
        may be removed afterwards. ``mapped`` is the direction of its vocabulary map, if it has one.
        """
        module = library()
        device = "cuda" if module.get_cuda_device_count() else "cpu"
        translator = module.Translator(str(folder), device=device, intra_threads=torch.get_num_threads())
        pieces = json.loads((folder / PIECES).read_text(encoding="utf-8"))
        known = Vocabulary.load(vocabulary)
        return cls(translator, pieces, recipe, known, recipe.languages, step, home, route, mapped)

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[Hypothesis]:
        """Find the best translation of each token sequence, see :class:`lsmoe_ds.inference.engine.Engine`."""
        self.languages.direction_id(direction)
        source_target = self.recipe.data.tags == "source-target"
        tag = self.vocabulary.tag_id(direction.source if source_target else direction.target)
        given = [self.pieces[self.vocabulary.tag_id(direction.target)]] if source_target else []
        texts = [[self.pieces[index] for index in (tag, *source)] for source in sources]
        is_mapped = direction == self.mapped
        limits = search.limits(torch.tensor([len(text) + 1 for text in texts])).tolist()
        found = [
            best
            for (best,) in self._translate(
                texts, given, is_mapped, max(limits) + 1, search.beam, search.length_penalty
            )
        ]
        over: dict[int, list[int]] = {}  # by greatest length, the sentences whose translation is longer
        for i, (pieces, _) in enumerate(found):
            if pieces[-1] != END or len(pieces) > len(given) + limits[i] + 1:
                over.setdefault(limits[i], []).append(i)
        for limit, which in over.items():
            # By sums, which only fall, what ended comes before what was cut: none of it is missing among the
            # beam's best.
            results = self._translate(
                [texts[i] for i in which], given, is_mapped, limit, search.beam, 0.0, search.beam
            )
            for i, result in zip(which, results, strict=True):
                ended = [self._end(texts[i], pieces, total) for pieces, total in result]
                scored = [(pieces, total / len(pieces) ** search.length_penalty) for pieces, total in ended]
                found[i] = max(scored, key=lambda each: each[1])
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        return [
            Hypothesis([ids[piece] for piece in pieces[len(given) : -1]], score) for pieces, score in found
        ]

    def _translate(
        self,
        texts: list[list[str]],
        given: list[str],
        is_mapped: bool,
        limit: int,
        beam: int,
        penalty: float,
        count: int = 1,
    ) -> list[list[Scored]]:
        """Search the ``count`` best translations of each text, each beginning with the pieces ``given``.

        A translation without an end after ``limit`` further pieces is cut. Raises UserError for scores that
        are not finite.
        """
        results = self.translator.translate_batch(
            texts,
            beam_size=beam,
            num_hypotheses=count,
            length_penalty=penalty or 1e-9,
            max_input_length=0,
            max_decoding_length=len(given) + limit,
            min_decoding_length=len(given) + 1,
            target_prefix=[given] * len(texts) if given else None,
            suppress_sequences=[[self.pieces[index]] for index in never_generated(self.vocabulary)],
            return_end_token=True,
            return_scores=True,
            use_vmap=is_mapped,
        )
        if not all(math.isfinite(score) for result in results for score in result.scores):
            raise UserError(NOT_FINITE)
        return [list(zip(result.hypotheses, result.scores, strict=True)) for result in results]

    def _end(self, text: list[str], pieces: list[str], total: float) -> Scored:
        """Return a translation with its end, and its score; ``total`` is the sum of its log-probabilities."""
        if pieces[-1] == END:
            return pieces, total
        end = self.translator.score_batch([text], [pieces], max_input_length=0)[0].log_probs[-1]
        return [*pieces, END], total + end
