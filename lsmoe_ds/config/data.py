"""Sections of a recipe about its text: the corpora, what is made of them, and how batches are filled."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import permutations
from os.path import abspath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lsmoe_ds.config.groups import Groups
from lsmoe_ds.config.host import Task
from lsmoe_ds.config.section import NAME, Fraction, Positive, Section, first_twice
from lsmoe_ds.directions import GROUPS, Direction, english_centric
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import check_code, is_english, nearest, normalize_code
from lsmoe_ds.notices import counted, listed

SMALLEST = 64  # pieces of a vocabulary
TagConvention = Literal["target", "source-target"]
LABELLED: dict[str, Task] = {"wikiann": "tag", "conll": "tag", "squad": "answer"}  # formats of other tasks
# Settings that do not apply to labelled corpora, whose text is used unchanged.
OF_TRANSLATION = ("directions", "cleaning", "held_out", "tags", "prompt", "pivot", "max_pairs", "train_on")
SHORTEST_WINDOW = 16  # tokens
NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")  # WikiANN's


class Corpus(Section):
    """Describe a corpus on disk. ``source`` and ``target`` name the languages where the layout does not.

    For layouts that contain only held-out sets, ``train`` names one that is used as training text.
    """

    path: Path
    format: Literal[
        "opus100",
        "flores",
        "ntrex",
        "iwslt",
        "moses",
        "tmx",
        "tsv",
        "translated",
        "wikiann",
        "conll",
        "squad",
    ]
    source: str | None = None
    target: str | None = None
    train: Literal["dev", "test"] | None = None

    @model_validator(mode="after")
    def _train(self) -> Corpus:
        allowed = {"flores": ("dev", "test"), "ntrex": ("test",)}.get(self.format, ())
        if self.train is not None and self.train not in allowed:
            has = (
                f"has only the set {' and '.join(allowed)}"
                if allowed
                else "has training text of its own: leave it out"
            )
            raise ValueError(f"'train' is {self.train}, but the format {self.format} {has}")
        return self

    @property
    def text(self) -> Hashable:
        """Return what two entries of a recipe have in common that name the same text, however they spell
        it.
        """
        languages = frozenset(normalize_code(code) for code in (self.source, self.target) if code)
        return re.sub(r"\.(gz|zst)$", "", abspath(self.path)), self.format, languages


class Vocabulary(Section):
    """Set up the vocabulary: it is trained on the text, or read from ``file`` (see
    :mod:`lsmoe_ds.data.vocabulary`).
    """

    file: Path | None = None
    size: Annotated[int, Field(ge=SMALLEST, le=2**20)] = 16000
    type: Literal["unigram", "bpe", "tokenizer"] = "unigram"
    character_coverage: Annotated[float, Field(gt=0.9, le=1.0)] = 0.9995
    sentences: Positive = 1_000_000


class Prompt(Section):
    """Set the text around a sentence pair for a decoder-only model, which learns the translation and ``end``.

    In ``text`` {source} stands for the source, {source_language} and {target_language} for the English names
    of the languages. Special tokens are written as in the model's tokenizer.
    """

    text: str = "Translate from {source_language} to {target_language}:\n{source}\n"
    end: str | None = None

    @field_validator("text")
    @classmethod
    def _placeholders(cls, value: str) -> str:
        found = re.findall(r"\{[A-Za-z_]*\}", value)
        known = ("{source}", "{source_language}", "{target_language}")
        if wrong := [each for each in found if each not in known]:
            raise ValueError(f"'text' has {wrong[0]}, which stands for nothing: known are {listed(known)}")
        if found.count("{source}") != 1:
            times = counted(found.count("{source}"), "time")
            raise ValueError(f"'text' has {{source}} {times}: it must have it once")
        return value


class Cleaning(Section):
    """Limit which pairs are kept; words are counted on the English (or first) side.

    With ``identified`` a pair is dropped if a side is in another language with at least this probability, by
    fastText's small model.
    """

    min_words: Positive = 3
    max_words: Positive = 200
    script_share: Fraction = 0.5
    identified: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class HeldOut(Section):
    """Set how many pairs of a bitext become dev and test; both sides are kept out of all training text."""

    dev: Annotated[int, Field(ge=0)] = 200
    test: Annotated[int, Field(ge=0)] = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1


class Batch(Section):
    """Set the size of a step: ``count`` batches of at most ``tokens`` tokens each, source and target with
    padding, for any number of ranks.
    """

    tokens: Annotated[int, Field(ge=16)] = 4096
    count: Positive = 1
    languages: Literal["mixed", "homogeneous", "task-affine"] = "mixed"
    max_length: Annotated[int, Field(ge=4)] = 256


class Data(Section):
    """Describe the text of a run.

    ``name`` is the name of the prepared data, by default that of the recipe. ``tags`` says which language
    tags the model reads. ``target``: the target's tag before the source. ``source-target``: the source's tag
    before the source, and the target's tag before the translation, which is given and not learned.
    ``prompt`` is for a model that is only a decoder (``model.huggingface``) and reads no tags. Bitexts that
    have sentences of the language ``pivot`` in common are joined into new ones (see
    :mod:`lsmoe_ds.data.pivot`). ``max_pairs`` limits the training pairs of each bitext, or of each bitext of
    a language. With ``train_on`` only text that a model has translated is trained on; other text serves as
    dev and test sets.

    Corpora of other tasks have one language each. ``labels`` are the tags of names in the BIO scheme.
    Questions are read with windows of their context that overlap by ``stride`` tokens.
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
    prompt: Prompt | None = None
    pivot: str | None = None
    max_pairs: Positive | dict[str, Positive] | None = None
    train_on: Literal["translated"] | None = None
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    stride: Annotated[int, Field(ge=0)] | None = None

    @property
    def task(self) -> Task:
        """Tell what the corpora are for."""
        formats = [corpus.format for corpus in self.corpora if isinstance(corpus, Corpus)]
        return next((LABELLED[each] for each in formats if each in LABELLED), "translate")

    def most_pairs(self, codes: Iterable[str]) -> int | None:
        """Return the largest number of training pairs of a bitext of these languages; None if any."""
        caps = self.max_pairs
        if not isinstance(caps, dict):
            return caps
        return min((caps[code] for code in codes if code in caps), default=None)

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

    @model_validator(mode="before")
    @classmethod
    def _all_directions(cls, value: Any) -> Any:
        """Write out ``directions: all``: every ordered pair of ``languages``."""
        given = value.get("directions") if isinstance(value, dict) else None
        if given != "all":
            if isinstance(given, str) and (guess := nearest(given.lower(), ["all"])):
                raise ValueError(f"'directions' is '{given}'{guess}: write all, or a list, as in [en-de]")
            return value
        codes = value.get("languages")
        if not isinstance(codes, list) or len(codes) < 2 or not all(isinstance(code, str) for code in codes):
            raise ValueError("'directions' is all: 'languages' must list at least two languages")
        if twice := first_twice(codes):
            raise ValueError(f"'languages' names {twice} twice: name it once")
        return {**value, "directions": ["-".join(pair) for pair in permutations(codes, 2)]}

    @model_validator(mode="before")
    @classmethod
    def _by_language(cls, value: Any) -> Any:
        """Give labelled corpora a direction for each language, from it into itself."""
        corpora = value.get("corpora") if isinstance(value, dict) else None
        formats = [
            each.get("format") if isinstance(each, dict) else None
            for each in (corpora if isinstance(corpora, list) else ())
        ]
        tasks = {LABELLED.get(str(each), "translate") for each in formats}
        if not tasks - {"translate"}:
            return value
        if len(tasks) > 1:
            raise ValueError(f"'corpora' are for {listed(sorted(tasks))}: a recipe has one task")
        codes = value.get("languages")
        if not isinstance(codes, list) or not codes or not all(isinstance(each, str) for each in codes):
            raise ValueError(f"corpora of the format {formats[0]} are by language: list 'languages'")
        own = [f"{code}-{code}" for code in codes]
        given = {key: value[key] for key in OF_TRANSLATION if value.get(key) is not None}
        if given.get("directions") == own:  # the recipe was written by us, with all keys
            given.pop("directions")
        defaults = {name: cls.model_fields[name].get_default(call_default_factory=True) for name in given}
        for key, found in given.items():
            default = defaults[key]
            if isinstance(default, Section) and isinstance(found, dict):  # with or without keys that are None
                found = {name: each for name, each in found.items() if each is not None}
                default = default.model_dump(exclude_none=True)
            if found != default:
                raise ValueError(
                    f"'{key}' is for translation, but {formats[0]} is a format of labelled text: leave it out"
                )
        task = tasks.pop()
        more = {"labels": value.get("labels") or list(NAMES)} if task == "tag" else {}
        if task == "answer" and value.get("stride") is None:
            more = {"stride": 128}
        return {**{k: v for k, v in value.items() if k not in given}, "directions": own, **more}

    @field_validator("labels")
    @classmethod
    def _scheme(cls, labels: list[str] | None) -> list[str] | None:
        for label in labels or ():
            if label != "O" and not re.fullmatch(r"[BI]-\S+", label):
                raise ValueError(f"'labels' has {label}, which is no tag of the BIO scheme: O, B-X or I-X")
        if labels and (twice := first_twice(labels)):
            raise ValueError(f"'labels' has {twice} twice: name it once")
        if labels and labels[0] != "O":
            raise ValueError(f"'labels' begins with {labels[0]}: O, of a word in no name, must be the first")
        return labels

    @model_validator(mode="after")
    def _of_task(self) -> Data:
        for key, task in (("labels", "tag"), ("stride", "answer")):
            if getattr(self, key) is not None and self.task != task:
                kinds = [name for name, of in LABELLED.items() if of == task]
                raise ValueError(f"'{key}' is for corpora of the format {listed(kinds)}: leave it out")
        formats = [corpus.format for corpus in self.corpora if isinstance(corpus, Corpus)]
        if self.train_on is not None and self.train_on not in formats:
            raise ValueError(
                "'train_on' is translated, but no corpus has that format: add one that `lsmoe translate "
                "--corpus` wrote"
            )
        if self.task != "translate" and not self.groups.listed and self.groups != Groups():
            raise ValueError(
                "'groups' has numbers of training pairs, of which labelled text has none: list the languages "
                "of each group"
            )
        if self.task == "answer" and self.batch.max_length < SHORTEST_WINDOW:
            raise ValueError(
                f"'batch.max_length' is {self.batch.max_length}: a question and a part of its context need "
                f"at least {SHORTEST_WINDOW} tokens"
            )
        if self.stride is not None and self.stride > self.batch.max_length // 2:
            raise ValueError(
                f"'stride' is {self.stride}, more than half of the {self.batch.max_length} tokens of a "
                "window ('batch.max_length'): give a smaller one"
            )
        return self

    @model_validator(mode="after")
    def _directions(self) -> Data:
        for code in self.languages:
            _as_value_error(check_code, code)
        if twice := first_twice(self.languages):
            raise ValueError(f"'languages' names {twice} twice: name it once")
        if not self.directions:
            if not [code for code in self.languages if not is_english(code)]:
                raise ValueError(
                    "'languages' names no language beside English: list at least one, or write 'directions'"
                )
            self.directions = [str(d) for d in english_centric(self.languages)]
        parse = Direction.parse_translation if self.task == "translate" else Direction.parse
        parsed = [_as_value_error(parse, d) for d in self.directions]
        if twice := first_twice(parsed):
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
        _check_groups(self.groups.listed, used)
        if isinstance(self.max_pairs, dict) and (unknown := sorted(self.max_pairs.keys() - used)):
            raise ValueError(f"'max_pairs' names {unknown[0]}, which is no language of the recipe")
        if self.pivot is not None:
            _as_value_error(check_code, self.pivot)
        return self

    def only(self, direction: Direction) -> Data:
        """Return the same with one direction: what it says of other languages is left out."""
        codes = tuple(dict.fromkeys((direction.source, direction.target)))
        groups = self.groups
        if groups.listed:
            lists = {
                name: [code for code in codes if self.groups.listed[code] == name] or None for name in GROUPS
            }
            groups = groups.model_copy(update=lists)
        caps = self.max_pairs
        if isinstance(caps, dict):
            caps = {code: cap for code, cap in caps.items() if code in codes} or None
        changes = {"languages": list(codes), "directions": [str(direction)]}
        return self.model_copy(update={**changes, "groups": groups, "max_pairs": caps})


def _check_groups(listed: Mapping[str, str], codes: AbstractSet[str]) -> None:
    """Raise ValueError unless the groups, if they are lists, name exactly the languages ``codes``."""
    if unknown := sorted(listed.keys() - codes):
        raise ValueError(
            f"'groups' names {unknown[0]}, which is no language of the recipe ({', '.join(sorted(codes))})"
        )
    if listed and (lacking := sorted(codes - listed.keys())):
        raise ValueError(f"'groups' lacks {', '.join(lacking)}: each language is in one group")


def _as_value_error(function: Any, value: str) -> Any:
    try:
        return function(value)
    except UserError as error:
        raise ValueError(str(error)) from None
