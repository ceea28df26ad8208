"""Read translated messages of software, without markup: gettext catalogues and MediaWiki's files."""

from __future__ import annotations

import html
import json
import re
import struct
from collections.abc import Iterator

TAG = re.compile(r"<[^<>]{0,400}>")
SPACE_BEFORE_MARK = re.compile(r"\s+([.,;:!?…])(?=\s|$)")
BLANKS = re.compile(r"\s+")

# [[page|text]] and [[page]]; [address text] and [$1 text]
WIKI_LINK = re.compile(r"\[\[(?:[^\]|]*\|)?:?([^\]|]*)\]\]|\[(?:(?:https?:)?//\S+|\$\d+) ([^\]]*)\]")
WIKI_QUOTES = re.compile(r"'{2,5}")
WIKI_GRAMMAR = re.compile(r"\{\{GRAMMAR:[^|{}]*\|([^{}]*)\}\}", re.IGNORECASE)
WIKI_LINE_MARKS = re.compile(r"^[*#:;= ]+|=+ *$", re.MULTILINE)

# The Battle for Wesnoth: "female^Elf", <ref>dst='page' text='the words'</ref>, <i>words</i>
GAME_CONTEXT = re.compile(r"^[^^<>]{1,60}\^")
GAME_ELEMENT = re.compile(r"<(ref|header|bold|italic|format|img|jump)>(.*?)</\1>", re.DOTALL)
GAME_TEXT = re.compile(r"\btext=(['\"])(.*?)(?<!\\)\1", re.DOTALL)
GAME_LIST = re.compile(r"([^\s,|]+[,|]){4}")  # lists from which the game makes names
GAME_TAG = re.compile(r"</?(i|b|u|span|small|big|tt)\b[^<>]{0,400}>")


def without_tags(text: str, accelerator: str = "") -> str:
    """Return the text of an HTML message on one line.

    ``accelerator`` is the character that marks a menu's key, if there is one; it is removed.
    """
    if accelerator and accelerator in text:
        # "Datei (_F)" in scripts that lack the letter of the key, "_File" in others
        text = re.sub(rf"\s*\({accelerator}\w\)", "", text)
        text = re.sub(rf"(?<!\w){accelerator}(?=\w)|(?<=\w){accelerator}(?=\w)", "", text, count=1)
    if "<" in text or "&" in text:
        text = TAG.sub(" ", html.unescape(html.unescape(TAG.sub(" ", text))))
        text = SPACE_BEFORE_MARK.sub(r"\1", text).replace("( ", "(").replace(" )", ")")
    return BLANKS.sub(" ", text).strip()


def without_wiki_markup(text: str) -> str:
    """Return the text of a message in MediaWiki's markup on one line.

    Variables (``$1``, ``{{PLURAL:...}}``) stay; cleaning drops such pairs.
    """
    if "[" in text:
        text = WIKI_LINK.sub(lambda match: match.group(1) or match.group(2) or " ", text)
    if "{{" in text:
        text = WIKI_GRAMMAR.sub(r"\1", text)
    return without_tags(WIKI_LINE_MARKS.sub("", WIKI_QUOTES.sub("", text)))


def without_game_markup(text: str) -> str:
    """Return the text of a message of The Battle for Wesnoth on one line; empty for lists of names.

    The context before ``^`` is removed.
    """

    def words(match: re.Match[str]) -> str:
        found = GAME_TEXT.search(match.group(2))
        return found.group(2).replace("\\'", "'") if found else ""

    return (
        ""
        if GAME_LIST.search(text)
        else without_tags(GAME_TAG.sub("", GAME_ELEMENT.sub(words, GAME_CONTEXT.sub("", text))))
    )


def read_catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (English, translation) of each entry of a compiled gettext catalogue (.mo).

    Such a catalogue holds neither fuzzy nor obsolete entries. Entries with plurals are left out. Raises
    ValueError if the bytes are not such a catalogue.
    """
    magic = data[:4]
    if magic not in (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde") or len(data) < 20:
        raise ValueError("not a compiled gettext catalogue")
    order = "<" if magic == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    try:
        for index in range(count):
            length, start = struct.unpack_from(f"{order}2I", data, originals + 8 * index)
            english = data[start : start + length]
            length, start = struct.unpack_from(f"{order}2I", data, translations + 8 * index)
            if not english or b"\0" in english:  # the header, or an entry with plurals
                continue
            yield english.decode("utf-8").rpartition("\x04")[2], data[start : start + length].decode("utf-8")
    except struct.error:
        raise ValueError("a catalogue that ends too early") from None


def read_messages(data: bytes) -> dict[str, str]:
    """Return the messages of a MediaWiki ``i18n/CODE.json`` by key. ValueError if it is no JSON object."""
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return {key: text for key, text in value.items() if isinstance(text, str) and not key.startswith("@")}
