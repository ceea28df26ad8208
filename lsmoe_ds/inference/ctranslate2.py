"""Translate with CTranslate2, whose beam search is set to find the same translations as ours.

Both finish the candidates of a beam that end in EOS, replace them by the next best that do not, and stop a
sentence when ``beam`` hypotheses are finished. The settings for this: return EOS, because CTranslate2 counts
it in the length only then; ``coverage_penalty`` 0 and ``patience`` 1; ``min_decoding_length`` 1, so that no
translation begins with EOS; and a tiny length penalty instead of 0, because at 0 CTranslate2 stops a sentence
as soon as its best candidate ends.

CTranslate2 has one maximum length for a batch (that of its longest source), and cuts hypotheses there instead
of ending them. So a sentence of which any translation exceeds its own maximum length is searched again with
that limit, and a cut hypothesis gets an EOS with the probability that the model gives it. Two small
differences from our search remain: tokens that are never generated have a share of that EOS's probability
distribution, and CTranslate2 returns only the best ``beam`` of ended and cut hypotheses.
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
MAP = "vmap.txt"  # the vocabulary map; CTranslate2 looks for this name
Scored = tuple[list[str], float]  # pieces, with EOS if they have ended, and their score


def library() -> Any:
    """Import the module. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("ctranslate2")
    except ImportError:
        raise UserError("CTranslate2 is not installed: pip install ctranslate2") from None


@dataclass(frozen=True)
class CTranslate2:
    """A model in CTranslate2, on the GPU if the library finds one. ``pieces`` has the token of each id."""

    translator: Any
    pieces: list[str]
    recipe: Recipe
    vocabulary: Vocabulary
    languages: Languages
    step: int
    home: Path
    route: Route = "specific"
    mapped: Direction | None = None  # the only direction for which a vocabulary map limits the candidates

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
    ) -> list[list[Hypothesis]]:
        """Find the best translations of token sequences, see :class:`lsmoe_ds.inference.engine.Engine`."""
        self.languages.direction_id(direction)
        source_target = self.recipe.data.tags == "source-target"
        tag = self.vocabulary.tag_id(direction.source if source_target else direction.target)
        given = [self.pieces[self.vocabulary.tag_id(direction.target)]] if source_target else []
        texts = [[self.pieces[index] for index in (tag, *source)] for source in sources]
        is_mapped = direction == self.mapped
        limits = search.limits(torch.tensor([len(text) + 1 for text in texts])).tolist()
        found = self._translate(
            texts, given, is_mapped, max(limits) + 1, search.beam, search.length_penalty, search.n_best
        )
        over: dict[int, list[int]] = {}  # sentences with a longer translation, by their maximum length
        for i, (result, limit) in enumerate(zip(found, limits, strict=True)):
            if any(pieces[-1] != END or len(pieces) > len(given) + limit + 1 for pieces, _ in result):
                over.setdefault(limit, []).append(i)
        for limit, which in over.items():
            # By sums, which only fall, ended hypotheses mostly come before cut ones, so few are missing among
            # the beam's best: one that ended late may have a lower sum than those that are cut.
            results = self._translate(
                [texts[i] for i in which], given, is_mapped, limit, search.beam, 0.0, search.beam
            )
            for i, result in zip(which, results, strict=True):
                ended = [self._end(texts[i], pieces, total) for pieces, total in result]
                scored = [(pieces, total / len(pieces) ** search.length_penalty) for pieces, total in ended]
                found[i] = sorted(scored, key=lambda each: each[1], reverse=True)[: search.n_best]
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        return [
            [Hypothesis([ids[piece] for piece in pieces[len(given) : -1]], score) for pieces, score in result]
            for result in found
        ]

    def _translate(
        self,
        texts: list[list[str]],
        given: list[str],
        is_mapped: bool,
        limit: int,
        beam: int,
        penalty: float,
        count: int,
    ) -> list[list[Scored]]:
        """Find the ``count`` best translations of each text, all beginning with the pieces ``given``.

        A translation that has not ended after ``limit`` further pieces is cut. Raises UserError for scores
        that are not finite.
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
        """Append EOS to a cut translation and score it; ``total`` is the sum of its log-probabilities."""
        if pieces[-1] == END:
            return pieces, total
        end = self.translator.score_batch([text], [pieces], max_input_length=0)[0].log_probs[-1]
        return [*pieces, END], total + end
