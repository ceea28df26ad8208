"""Sections of a recipe about its text: the corpora, what is made of them, and how batches are filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from os.path import abspath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lsmoe_ds.config.section import NAME, Fraction, Positive, Section
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import Direction, check_code, english_centric, is_english, normalize_code

SMALLEST = 64  # pieces of a vocabulary
TagConvention = Literal["target", "source-target"]


class Corpus(Section):
    """Describe a corpus on disk. ``source`` and ``target`` name the languages where the layout does not."""

    path: Path
    format: Literal["opus100", "flores", "ntrex", "iwslt", "moses", "tsv"]
    source: str | None = None
    target: str | None = None

    @property
    def text(self) -> Hashable:
        """Return what two entries of a recipe have in common that name the same text, however they spell
        it.
        """
        languages = frozenset(normalize_code(code) for code in (self.source, self.target) if code)
        return abspath(self.path).removesuffix(".gz"), self.format, languages


class Vocabulary(Section):
    """Set up the vocabulary: one is trained on the text, or ``file`` is one (see
    :mod:`lsmoe_ds.data.vocabulary`).
    """

    file: Path | None = None
    size: Annotated[int, Field(ge=SMALLEST, le=2**20)] = 16000
    type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: Annotated[float, Field(gt=0.9, le=1.0)] = 0.9995
    sentences: Positive = 1_000_000


class Cleaning(Section):
    """Limit which pairs are kept; words are counted on the English (or first) side."""

    min_words: Positive = 3
    max_words: Positive = 200
    script_share: Fraction = 0.5


class HeldOut(Section):
    """Set how many pairs of a bitext become dev and test; both sides are kept out of all training text."""

    dev: Annotated[int, Field(ge=0)] = 200
    test: Annotated[int, Field(ge=0)] = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1


class Batch(Section):
    """A step takes ``count`` batches of at most ``tokens`` padded tokens each (source + target), whatever the
    number of ranks.
    """

    tokens: Annotated[int, Field(ge=16)] = 4096
    count: Positive = 1
    languages: Literal["mixed", "homogeneous", "task-affine"] = "mixed"
    max_length: Annotated[int, Field(ge=4)] = 256


class Groups(Section):
    """Resource groups by training pairs: at least ``high`` is high, at least ``medium`` is medium, the rest
    is low.
    """

    high: Positive = 1_000_000
    medium: Positive = 100_000

    @model_validator(mode="after")
    def _order(self) -> Groups:
        if self.medium > self.high:
            raise ValueError(
                f"'medium' is {self.medium}, which is more than {self.high}, the value of 'high': it must be "
                "at most that"
            )
        return self

    def of(self, pairs: int) -> str:
        """Return the group of a direction with ``pairs`` training pairs: ``high``, ``medium`` or ``low``."""
        return "high" if pairs >= self.high else "medium" if pairs >= self.medium else "low"


class Data(Section):
    """Describe the text of a run.

    ``name`` names the prepared data, by default as the recipe is named. ``tags`` says which tags a model
    reads: that of the ``target`` before the source and none before the translation, or that of the source
    language before the source and that of the target language before the translation, which is given and not
    learned.
    """

    name: Annotated[str, Field(pattern=NAME)] | None = None
    corpora: Annotated[list[str | Corpus], Field(min_length=1)]
    directory: Path = Path("data")
    languages: list[str] = Field(default_factory=list)
    directions: list[str] = Field(default_factory=list)
    vocabulary: Vocabulary = Vocabulary()
    cleaning: Cleaning = Cleaning()
    held_out: HeldOut = HeldOut()
    groups: Groups = Groups()
    temperature: Annotated[float, Field(ge=1.0)] = 5.0
    batch: Batch = Batch()
    tags: TagConvention = "target"

    @field_validator("corpora")
    @classmethod
    def _each_corpus_once(cls, corpora: list[str | Corpus]) -> list[str | Corpus]:
        named: dict[Hashable, str] = {}
        for corpus in corpora:
            name, text = (corpus, corpus) if isinstance(corpus, str) else (str(corpus.path), corpus.text)
            if text in named:
                spelled = "" if named[text] == name else f" (as {named[text]} and {name})"
                raise ValueError(f"the corpus {name} is there twice{spelled}: leave one of the two out")
            named[text] = name
        return corpora

    @model_validator(mode="after")
    def _directions(self) -> Data:
        for code in self.languages:
            _as_value_error(check_code, code)
        if twice := _twice(self.languages):
            raise ValueError(f"'languages' names {twice} twice: name it once")
        if not self.directions:
            if not [code for code in self.languages if not is_english(code)]:
                raise ValueError(
                    "'languages' names no language beside English: list at least one, or write 'directions'"
                )
            self.directions = [str(d) for d in english_centric(self.languages)]
        parsed = [_as_value_error(Direction.parse, d) for d in self.directions]
        if twice := _twice(parsed):
            raise ValueError(f"'directions' names {twice} twice: name it once")
        used = {code for direction in parsed for code in (direction.source, direction.target)}
        if unused := [code for code in self.languages if code not in used and not is_english(code)]:
            raise ValueError(
                f"'languages' names {unused[0]}, which none of 'directions' has: add one, or leave it out"
            )
        if self.languages and (
            lacking := sorted(code for code in used - set(self.languages) if not is_english(code))
        ):
            raise ValueError(
                f"'languages' lacks {lacking[0]}, which 'directions' has: add it, or leave 'languages' out"
            )
        return self


def _twice(values: Iterable[Hashable]) -> Any:
    """Return the first of the values that is there more than once, or None."""
    return next((value for value, times in Counter(values).items() if times > 1), None)


def _as_value_error(function: Any, value: str) -> Any:
    try:
        return function(value)
    except UserError as error:
        raise ValueError(str(error)) from None
